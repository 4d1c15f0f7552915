"""ACT: queries (and keys) that fall into the same hash buckets attend as one, their mean.

Zheng et al. 2020, "End-to-End Object Detection with Adaptive Clustering Transformer". No token is
dropped.

Letters in shapes: S sequences (images times heads), N tokens, C clusters, B images, H heads, d
channels of a head, V channels of values, n hashes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.token_reduction.hashing import HashedAttention
from baselines.token_reduction.reducer import Attended, Facts, State
from utils.precision import at_least_float32
from utils.ranges import check_count, check_flags

BUCKET = 8.0  # width of a hash bucket
LONGEST = 32  # hashes of two bits in a word of 64


def hash_buckets(x: Tensor, gaussian: Tensor, shift: Tensor) -> Tensor:
    """Buckets [S N n] of tokens x [S N d], from 0 in each sequence: floor((x G + b) / 8)."""
    buckets = ((x @ gaussian + shift) / BUCKET).floor()
    return (buckets - buckets.amin(dim=1, keepdim=True)).long()


def packed_keys(buckets: Tensor) -> Tensor:
    """One word for each row of buckets [S N n], two bits a hash, as published: [S N].

    A bucket beyond 3 spills into its neighbour's bits, so that strangers may share a word.
    """
    shifts = 2 * torch.arange(buckets.shape[-1], device=buckets.device)
    return (buckets << shifts).sum(dim=-1)


def fingerprint_keys(buckets: Tensor, seed: int = 0) -> Tensor:
    """One word for each row of buckets [S N n] that only equal rows share: [S N].

    A random odd 64-bit multiplier for each hash; two rows collide with a chance of 2^-63.
    """
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**62), 2**62, (buckets.shape[-1],), generator=generator, device="cpu")
    return (buckets * (2 * words + 1).to(buckets.device)).sum(dim=-1)


def cluster_ids(keys: Tensor) -> Tensor:
    """Cluster of each token [S N]: equal keys share one, numbered by ascending key."""
    ordered, places = keys.sort(dim=1)
    fresh = torch.zeros_like(keys)
    fresh[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).long()
    return torch.zeros_like(keys).scatter(1, places, fresh.cumsum(dim=1))


def count_clusters(ids: Tensor) -> int:
    """Number of clusters of the sequence with the most; 0 if there is no sequence."""
    return int(ids.max()) + 1 if ids.numel() else 0


def cluster_counts(ids: Tensor, num_clusters: int) -> Tensor:
    """Tokens in each cluster [S C]."""
    counts = torch.zeros(len(ids), num_clusters, dtype=torch.long, device=ids.device)
    return counts.scatter_add(1, ids, torch.ones_like(ids))


def cluster_means(x: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
    """Mean of the tokens x [S N d] of each cluster [S C d]; 0 of an empty one."""
    index = ids[..., None].expand(-1, -1, x.shape[-1])
    sums = x.new_zeros(len(x), counts.shape[1], x.shape[-1]).scatter_add(1, index, x)
    return sums / counts.clamp(min=1)[..., None].to(x.dtype)


def clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Attention [S N V] of q, k [S N d], v [S N V] with tokens of one cluster as their mean.

    query_ids, key_ids [S N]: clusters, None: each token by itself. A cluster of keys counts as
    often as it has members.
    """
    bias = None
    if key_ids is not None:
        counts = cluster_counts(key_ids, count_clusters(key_ids))
        k, v = cluster_means(k, key_ids, counts), cluster_means(v, key_ids, counts)
        bias = counts.to(q.dtype).log()[:, None]
    if query_ids is not None:
        counts = cluster_counts(query_ids, count_clusters(query_ids))
        q = cluster_means(q, query_ids, counts)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    if query_ids is None:
        return out
    return out.gather(1, query_ids[..., None].expand(-1, -1, out.shape[-1]))


class ClusteredAttention(HashedAttention):
    """Attention of clusters of queries, or of keys, in a range of blocks.

    start, stop: the blocks, stop exclusive; by default all plain ones.
    group_queries, group_keys: what is clustered. query_hashes, key_hashes: more hashes, more
        clusters.
    form: "sound": tokens share a cluster where all buckets are equal, the buckets' shift is drawn
        over their width, and prefix tokens are left alone; "published": two bits a hash, spilling
        over, shift in [0, 1), the class token clustered like any other, at most 32 hashes.
    seed: of the projections; None draws them anew in every pass, as published.
    The number of clusters depends on the data, so `torch.compile(fullgraph=True)` is not possible.
    Record: block<i>.q.groups [S N] and .q.counts [S C], the same of k.
    """

    title = "ACT"

    def __init__(
        self,
        start: int | None = None,
        stop: int | None = None,
        *,
        group_queries: bool = True,
        group_keys: bool = False,
        query_hashes: int = 32,
        key_hashes: int = 32,
        form: str = "sound",
        seed: int | None = 0,
    ) -> None:
        super().__init__(start, stop, form, seed)
        check_flags(group_queries=group_queries, group_keys=group_keys)
        for name, count, used in (
            ("query_hashes", query_hashes, group_queries),
            ("key_hashes", key_hashes, group_keys),
        ):
            check_count(name, count, 1)
            if used and form == "published" and count > LONGEST:
                raise ValueError(
                    f'{name} {count}: form "published" packs two bits a hash into 64, so at most '
                    f'{LONGEST}; form "sound" takes any number'
                )
        self.group_queries, self.group_keys = group_queries, group_keys
        self.query_hashes, self.key_hashes = query_hashes, key_hashes

    def bind(self, facts: Facts) -> None:
        """Fit the options to a network, and draw the projections."""
        super().bind(facts)
        for role, hashes in (("q", self.query_hashes), ("k", self.key_hashes)):
            names = [f"block{index}.{role}" for index in self.blocks]
            self.draws.prepare(names, facts.head_dim, hashes)

    def works_inside(self, index: int) -> bool:
        """Whether the block is in the range, and anything is clustered in it."""
        return super().works_inside(index) and (self.group_queries or self.group_keys)

    def attend(
        self, state: State, index: int, q: Tensor, k: Tensor, v: Tensor, normed: Tensor
    ) -> Attended:
        """Attention of the clusters' means, copied back to their members."""
        shape, scaled = q.shape, q * q.shape[-1] ** -0.5
        sequences = [x.flatten(0, 1) for x in (scaled, k, v)]
        alone = state.num_prefix if self.form == "sound" else 0
        q_ids = self._ids(state, f"block{index}.q", sequences[0], self.query_hashes, alone)
        k_ids = self._ids(state, f"block{index}.k", sequences[1], self.key_hashes, alone)
        out = clustered_attention(
            *sequences,
            query_ids=q_ids if self.group_queries else None,
            key_ids=k_ids if self.group_keys else None,
        )
        return Attended(out.unflatten(0, shape[:2]))

    def _ids(self, state: State, name: str, x: Tensor, hashes: int, alone: int) -> Tensor | None:
        """Clusters [S N]; the first `alone` tokens have one each."""
        if not (self.group_queries if name.endswith("q") else self.group_keys):
            return None
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            ids = self.group(at_least_float32(x[:, alone:]), name, hashes)
            if alone:
                own = torch.arange(alone, device=x.device).expand(len(x), -1)
                ids = torch.cat([own, ids + alone], dim=1)
            state.note(f"{name}.groups", ids)
            if state.record is not None:
                state.note(f"{name}.counts", cluster_counts(ids, count_clusters(ids)))
        return ids

    def group(self, x: Tensor, name: str, hashes: int) -> Tensor:
        """Clusters [S N] of tokens x [S N d] by the projection of that name."""
        gaussian, shift = self.draws.get(name, x.shape[-1], hashes, x)
        if self.form == "published":
            return cluster_ids(packed_keys(hash_buckets(x, gaussian, shift)))
        return cluster_ids(fingerprint_keys(hash_buckets(x, gaussian, shift * BUCKET)))
