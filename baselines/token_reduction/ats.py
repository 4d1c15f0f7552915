"""ATS: patches are sampled by their share in what the class token attends to.

Fayyaz et al. 2022, "Adaptive Token Sampling for Efficient Vision Transformers".

Letters in shapes: B images, T tokens, P prefix tokens, N patch tokens of a block, K places for kept
ones, S samples, H heads, d channels of a head, D channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.selection import rows_of
from baselines.token_reduction.options import block_list
from baselines.token_reduction.reducer import (
    Attended,
    Facts,
    Reducer,
    State,
    check_blocks,
    check_class_token,
)
from utils.precision import at_least_float32
from utils.ranges import check_flags, check_word

EPSILON = 1e-6
RESIDUALS = ("raw", "normed")


def masked_attention(
    q: Tensor, k: Tensor, live: Tensor | None = None, *, overlook: bool = False
) -> Tensor:
    """Attention [B H T T] of q, k [B H T d] to live keys [B T], and of each token to itself.

    Not exactly a softmax: EPSILON is spread over all keys, as published; with `overlook` over the
    live ones only, so that padding has no effect.
    """
    tokens = q.shape[2]
    # Half precision would lose EPSILON, and tell few of the sums apart that sample the tokens.
    scores = at_least_float32((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1))
    scores = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    if live is not None:
        own = torch.eye(tokens, dtype=torch.bool, device=q.device)
        scores = scores * (live[:, None] | own)[:, None].to(scores.dtype)
    spread: Tensor | float = EPSILON / tokens
    if live is not None and overlook:
        shares = live.to(scores.dtype) / live.sum(dim=1, keepdim=True)
        spread = EPSILON * shares[:, None, None]
    return (scores + spread) / (scores.sum(dim=-1, keepdim=True) + EPSILON)


def significance(attention: Tensor, v: Tensor, num_prefix: int) -> Tensor:
    """Share of each patch token in what the class token attends to [B N], summing to 1.

    Attention [B H T T] times the norm of the value, both over all heads (equation 4).
    """
    norms = at_least_float32(v).transpose(1, 2).flatten(2).norm(dim=-1)[:, num_prefix:]
    scores = attention[:, :, 0, num_prefix:].sum(dim=1) * norms
    return scores / scores.sum(dim=1, keepdim=True)


def sample_places(ascending: Tensor, num_samples: int, num_padding: Tensor | None = None) -> Tensor:
    """Which positions of ascending scores [B N] are picked, as booleans.

    Inverse transform sampling on a fixed grid: equal steps from the smallest non-zero value of the
    cumulative sum, scaled to [0, 1], to 1; each step picks the nearest place (section 3.2).
    num_padding [B]: how many of the smallest scores are padding, to be ignored. The published code
    does not ignore it, so that it shifts the grid.
    """
    total = ascending.cumsum(dim=1)
    low, high = total[:, :1], total[:, -1:]
    if num_padding is not None:
        low = total.gather(1, num_padding[:, None].clamp(max=total.shape[1] - 1))
    total = (total - low) / (high - low).clamp(min=torch.finfo(total.dtype).tiny)
    if num_padding is not None:
        places = torch.arange(total.shape[1], device=total.device)
        total = total.masked_fill(places < num_padding[:, None], -torch.inf)
    start = torch.where(total <= 0, torch.inf, total).amin(dim=1, keepdim=True).clamp(max=1.0)
    steps = torch.arange(num_samples, device=total.device, dtype=total.dtype)
    targets = start + (steps - start * steps) / max(num_samples - 1, 1)  # [B S]
    nearest = (targets[:, :, None] - total[:, None]).abs().argmin(dim=2)
    return torch.zeros_like(total, dtype=torch.bool).scatter(1, nearest, True)


class AdaptiveSampling(Reducer):
    """Inside the attention of some blocks, keeps the patch tokens that a fixed grid samples.

    locations: the blocks. Default: all (plain) ones but the first quarter, as in the paper.
    num_samples: samples, and so at most this many tokens stay: a number, or a share of the grid's
        patches (at most 1.0). Default: as many as the full grid has patches, as published.
    drop_tokens: shorten the sequences to the longest of the batch; off, shapes stand still and
        dropped tokens are zeros (for torch.compile).
    residual: what the attention is added to, the block's "raw" input (the paper) or the "normed"
        one (Expedit-SWAG).
    mask_padding: whether later blocks mask the padding of images that kept fewer. Without, as
        published, an image's result depends on the rest of its batch.
    Record: block<i>.sorted_scores and .sorted_indices [B N], block<i>.kept [B K], -1 for padding.
    """

    def __init__(
        self,
        locations: int | Sequence[int] | None = None,
        *,
        num_samples: "int | float | None" = None,
        drop_tokens: bool = True,
        residual: str = "raw",
        mask_padding: bool = True,
    ) -> None:
        check_word("residual", residual, RESIDUALS)
        check_flags(drop_tokens=drop_tokens, mask_padding=mask_padding)
        if num_samples is not None and not _can_be_sampled(num_samples):
            raise ValueError(
                f"num_samples {num_samples!r} must be a whole number of 1 or more, or a share in "
                "(0, 1.0]"
            )
        self.locations = None if locations is None else block_list("locations", locations)
        self.num_samples = num_samples
        self.drop_tokens, self.residual, self.mask_padding = drop_tokens, residual, mask_padding
        self.blocks: frozenset[int] = frozenset()

    def bind(self, facts: Facts) -> None:
        """Fit the options to a network; ValueError for blocks or tokens that it lacks."""
        super().bind(facts)
        check_class_token(facts, "ATS")
        start = facts.first + (facts.depth - facts.first) // 4
        chosen = range(start, facts.depth) if self.locations is None else self.locations
        self.blocks = frozenset(chosen)
        check_blocks(sorted(self.blocks), facts, "ATS block")

    def works_inside(self, index: int) -> bool:
        """In the chosen blocks, and after the first of them if there may be padding to mask."""
        behind = self.mask_padding and bool(self.blocks) and index > min(self.blocks)
        return index in self.blocks or behind

    def before_block(self, state: State, index: int, x: Tensor) -> Tensor:
        """The tokens, unchanged; dropped ones are restored with these values."""
        if index in self.blocks and state.traced:
            state.memory["input"] = x
        return x

    def attend(
        self, state: State, index: int, q: Tensor, k: Tensor, v: Tensor, normed: Tensor
    ) -> Attended:
        """Attention of the sampled tokens alone."""
        if index not in self.blocks:
            return Attended(self.softmax_attention(state, q, k, v))
        live, first = state.live, state.num_prefix
        if live is not None:
            q, k, v = (x * live[:, None, :, None].to(x.dtype) for x in (q, k, v))
        attention = masked_attention(q, k, live, overlook=self.mask_padding)
        with torch.no_grad():
            scores = significance(attention, v, first)
            # Only padding has ties, at 0: their order is the framework's, as in the published code.
            scores, order = scores.sort(dim=1)
            padding = None
            if live is not None and self.mask_padding:
                padding = (~live[:, first:]).sum(dim=1)
            picked = sample_places(scores, self._samples(state), padding)
            kept, valid = self._listed(picked, order)
        state.note(f"block{index}.sorted_scores", scores)
        state.note(f"block{index}.sorted_indices", order)
        state.note(f"block{index}.kept", torch.where(valid, kept, -1))
        prefix = torch.arange(first, device=q.device).expand(len(q), -1)
        rows = torch.cat([prefix, kept + first], dim=1)
        state.memory["rows"] = rows
        state.memory["valid"] = torch.cat([torch.ones_like(prefix, dtype=torch.bool), valid], dim=1)
        chosen = rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[2])
        weights = F.dropout(attention.gather(2, chosen), state.attn_drop, state.attn_drop > 0)
        residual = rows_of(normed, rows) if self.residual == "normed" else None
        if state.traced:
            state.move(self._places(state, q.shape[2]), state.memory.pop("input"))
        return Attended(weights.to(v.dtype) @ v, rows=rows, residual=residual)

    def after_attention(
        self, state: State, index: int, x: Tensor, attended: Attended, k: Tensor
    ) -> Tensor:
        """Tokens that stay [B P+K D]; padding is zero."""
        if index not in self.blocks:
            return x
        state.memory.pop("rows")
        valid = state.memory.pop("valid")
        # A batch without padding needs no mask; with constant shapes this is not checked.
        if self.drop_tokens and bool(valid.all()):
            state.live = state.key_bias = None
            return x
        state.live = valid
        if self.mask_padding:
            bias = torch.zeros_like(valid, dtype=x.dtype).masked_fill(~valid, -torch.inf)
            state.key_bias = bias[:, None, None]
        return x * valid[..., None].to(x.dtype)

    def after_block(self, state: State, index: int, x: Tensor) -> Tensor:
        """The same tokens, with padding set to zero again."""
        if index not in self.blocks or state.live is None:
            return x
        return x * state.live[..., None].to(x.dtype)

    def _samples(self, state: State) -> int:
        if self.num_samples is None:
            return state.num_patches
        if isinstance(self.num_samples, float):
            return max(1, round(self.num_samples * state.num_patches))
        return min(self.num_samples, state.num_patches)

    def _listed(self, picked: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Patch tokens at the picked positions [B K] in ascending order, and which are real.

        After them comes token 0, as padding.
        """
        counts = picked.sum(dim=1)
        width = int(counts.max()) if self.drop_tokens and len(counts) else picked.shape[1]
        places = (~picked).long().argsort(dim=1, stable=True)[:, :width]
        valid = torch.arange(width, device=picked.device) < counts[:, None]
        return torch.where(valid, order.gather(1, places), 0), valid

    @staticmethod
    def _places(state: State, num_tokens: int) -> Tensor:
        """Where each token goes [B T]; padding comes from nowhere."""
        rows, valid = state.memory["rows"], state.memory["valid"]
        batch, width = rows.shape
        # Padding is written to an extra place, which is cut off.
        target = torch.where(valid, rows, num_tokens)
        places = rows.new_full((batch, num_tokens + 1), -1)
        numbers = torch.arange(width, device=rows.device).expand(batch, -1)
        return places.scatter(1, target, numbers)[:, :num_tokens]


def _can_be_sampled(count: object) -> bool:
    """Whether it is a number of tokens, or a share of them."""
    if isinstance(count, float):
        return 0.0 < count <= 1.0
    return isinstance(count, int) and not isinstance(count, bool) and count >= 1
