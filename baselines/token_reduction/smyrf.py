"""SMYRF: queries and keys are sorted by hashes and attend within clusters of equal size.

Daras et al. 2020, "SMYRF: Efficient Attention using Asymmetric Clustering". No token is dropped.

Letters in shapes: S sequences (images times heads), Q queries, K keys, N tokens, d channels of a
head, V channels of values, n hashes, c chunks, B images, H heads, P prefix tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.token_reduction.hashing import HashedAttention
from baselines.token_reduction.reducer import Attended, Facts, State
from utils.precision import at_least_float32
from utils.ranges import check_counts


def lift(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys [S N d+2] on one sphere, where near means a large product (section 3.2).

    [q, 0, sqrt(M - |q|^2)] and [k, sqrt(M - |k|^2), 0] with M = max |q|^2 + max |k|^2.
    """
    q_squares, k_squares = q.square().sum(-1, keepdim=True), k.square().sum(-1, keepdim=True)
    most = q_squares.amax(1, keepdim=True) + k_squares.amax(1, keepdim=True)
    q_rest = (most - q_squares).clamp(min=0).sqrt()
    k_rest = (most - k_squares).clamp(min=0).sqrt()
    return (
        torch.cat([q, torch.zeros_like(q_rest), q_rest], dim=-1),
        torch.cat([k, k_rest, torch.zeros_like(k_rest)], dim=-1),
    )


def sort_by_hash(q: Tensor, k: Tensor, gaussian: Tensor) -> tuple[Tensor, Tensor]:
    """Order of queries [n S Q] and of keys [n S K] along each of n projections [d+2 n]."""
    with torch.no_grad():
        lifted = lift(q, k)
        # Not stable: ties are in the framework's order, as in the published code.
        orders = [(x @ gaussian).permute(2, 0, 1).argsort(dim=-1) for x in lifted]
    return orders[0], orders[1]


def _chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention [... V] and its logsumexp [...] within chunks; hidden keys do not count."""
    logits = (q @ k.transpose(-2, -1)) * scale
    if hidden is not None:
        logits = logits.masked_fill(hidden, -torch.inf)
    total = at_least_float32(logits).logsumexp(dim=-1)
    weights = (at_least_float32(logits) - total[..., None]).exp().to(v.dtype)
    return weights @ v, total


def _over_hashes(out: Tensor, total: Tensor, order: Tensor) -> Tensor:
    """Sorted outputs [n S Q V] back in order, weighted by how much each hash found: [S Q V]."""
    back = order.argsort(dim=-1)
    out = out.gather(2, back[..., None].expand(-1, -1, -1, out.shape[-1]))
    shares = total.gather(2, back).softmax(dim=0)
    return (shares[..., None].to(out.dtype) * out).sum(dim=0)


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """Rows of x [S N d] in each hash's order [n S N]: [n S N d]."""
    index = order[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.expand(len(order), -1, -1, -1).gather(2, index)


def straddling_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    orders: tuple[Tensor, Tensor],
    *,
    query_cluster_size: int,
    key_cluster_size: int,
    scale: float,
) -> Tensor:
    """The published form [S Q V]: all hashes and sequences form one line, which is cut into chunks.

    If the sizes do not divide the tokens, a chunk holds tokens of two sequences, which then see
    each other. ValueError if the line cannot be cut.
    """
    rows, columns = orders[0].numel(), orders[1].numel()
    if q.shape[1] // query_cluster_size != k.shape[1] // key_cluster_size:
        raise ValueError(
            f"{q.shape[1]} queries in clusters of {query_cluster_size} and {k.shape[1]} keys in "
            f"clusters of {key_cluster_size} are not as many clusters"
        )
    if rows % query_cluster_size or columns % key_cluster_size:
        raise ValueError(
            f'form "published" cuts {rows} queries into {query_cluster_size} and {columns} keys '
            f'into {key_cluster_size} without a rest; form "sound" takes any size'
        )
    parts = [
        _taken(x, order).flatten(0, 2)
        for x, order in zip((q, k, v), (orders[0], orders[1], orders[1]), strict=True)
    ]
    queries = parts[0].unflatten(0, (-1, query_cluster_size))
    keys, values = (part.unflatten(0, (-1, key_cluster_size)) for part in parts[1:])
    out, total = _chunk_attention(queries, keys, values, scale)
    return _over_hashes(
        out.reshape(*orders[0].shape, -1), total.reshape(orders[0].shape), orders[0]
    )


def padded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    orders: tuple[Tensor, Tensor],
    *,
    query_cluster_size: int,
    key_cluster_size: int,
    scale: float,
    shared: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Each sequence cut by itself, its last chunk padded and the padding hidden: [S Q V].

    shared: keys [S P d] and values [S P V] that every chunk sees besides its own.
    """
    chunks = -(-q.shape[1] // query_cluster_size)
    if chunks != -(-k.shape[1] // key_cluster_size):
        raise ValueError(
            f"{q.shape[1]} queries in clusters of {query_cluster_size} and {k.shape[1]} keys in "
            f"clusters of {key_cluster_size} are not as many clusters"
        )

    def cut(x: Tensor, order: Tensor, size: int) -> Tensor:
        padded = F.pad(_taken(x, order), (0, 0, 0, chunks * size - x.shape[1]))
        return padded.unflatten(2, (chunks, size))

    queries = cut(q, orders[0], query_cluster_size)  # [n S c q d]
    keys, values = cut(k, orders[1], key_cluster_size), cut(v, orders[1], key_cluster_size)
    places = torch.arange(chunks * key_cluster_size, device=k.device)
    hidden = (places >= k.shape[1]).unflatten(0, (chunks, 1, key_cluster_size))
    if shared is not None:
        more = [x[None, :, None].expand(len(keys), -1, chunks, -1, -1) for x in shared]
        keys, values = torch.cat([keys, more[0]], dim=3), torch.cat([values, more[1]], dim=3)
        hidden = F.pad(hidden, (0, shared[0].shape[1]), value=False)
    out, total = _chunk_attention(queries, keys, values, scale, hidden)
    out, total = out.flatten(2, 3)[:, :, : q.shape[1]], total.flatten(2, 3)[:, :, : q.shape[1]]
    return _over_hashes(out, total, orders[0])


class Smyrf(HashedAttention):
    """Attention within hashed clusters in a range of blocks.

    start, stop: the blocks, stop exclusive; by default all plain ones.
    num_hashes: rounds, each with its own sorting; query_cluster_size, key_cluster_size: tokens
        of a cluster.
    form: "sound": each sequence is padded to whole clusters, prefix tokens attend to all and are
        seen by all; "published": chunks straddle heads, hashes and images where the size does not
        divide the tokens, so that an image's result depends on its batch.
    seed: of the projections; None draws them anew in every pass, as published.
    Record: block<i>.q_positions and .k_positions [n S N].
    """

    title = "SMYRF"

    def __init__(
        self,
        start: int | None = None,
        stop: int | None = None,
        *,
        num_hashes: int = 32,
        query_cluster_size: int = 64,
        key_cluster_size: int | None = None,
        form: str = "sound",
        seed: int | None = 0,
    ) -> None:
        super().__init__(start, stop, form, seed)
        check_counts(1, num_hashes=num_hashes, query_cluster_size=query_cluster_size)
        key_cluster_size = query_cluster_size if key_cluster_size is None else key_cluster_size
        check_counts(1, key_cluster_size=key_cluster_size)
        self.num_hashes = num_hashes
        self.sizes = {
            "query_cluster_size": query_cluster_size,
            "key_cluster_size": key_cluster_size,
        }

    def bind(self, facts: Facts) -> None:
        """Fit the options to a network, and draw the projections."""
        super().bind(facts)
        names = [f"block{index}" for index in self.blocks]
        self.draws.prepare(names, facts.head_dim + 2, self.num_hashes)

    def attend(
        self, state: State, index: int, q: Tensor, k: Tensor, v: Tensor, normed: Tensor
    ) -> Attended:
        """Attention within clusters, joined over the rounds."""
        shape, scale = q.shape, q.shape[-1] ** -0.5
        first = state.num_prefix if self.form == "sound" else 0
        sequences = [x.flatten(0, 1) for x in (q, k, v)]
        queries, keys, values = (x[:, first:] for x in sequences)
        orders = self._orders(state, index, queries, keys)
        if self.form == "published":
            out = straddling_attention(queries, keys, values, orders, scale=scale, **self.sizes)
            return Attended(out.unflatten(0, shape[:2]))
        shared = (sequences[1][:, :first], sequences[2][:, :first]) if first else None
        out = padded_attention(
            queries, keys, values, orders, scale=scale, shared=shared, **self.sizes
        )
        out = out.unflatten(0, shape[:2])
        if first:
            prefix = F.scaled_dot_product_attention(q[:, :, :first], k, v)
            out = torch.cat([prefix, out], dim=2)
        return Attended(out)

    def _orders(self, state: State, index: int, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(q.device.type, enabled=False):
            q, k = at_least_float32(q), at_least_float32(k)
            gaussian, _ = self.draws.get(f"block{index}", q.shape[-1] + 2, self.num_hashes, q)
            orders = sort_by_hash(q, k, gaussian)
        state.note(f"block{index}.q_positions", orders[0])
        state.note(f"block{index}.k_positions", orders[1])
        return orders
