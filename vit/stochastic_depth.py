"""Residual branches that are dropped at random in training (Huang et al. 2016), per sequence."""

from collections.abc import Callable

import torch
from torch import Tensor

from vit.packing import Packing, make_packing, unpack

MODES = ("sample", "subset")
Branch = Callable[[Tensor, Packing | None], Tensor]


def drop_path_rates(rate: float, depth: int, uniform: bool) -> list[float]:
    """Rate of each block: the same everywhere (DeiT III, DINOv2), or rising from zero."""
    if uniform:
        return [rate] * depth
    return [rate * index / max(1, depth - 1) for index in range(depth)]


def add_branch(
    x: Tensor, branch: Branch, packing: Packing | None, *, rate: float, mode: str
) -> Tensor:
    """x + branch(x), where the branch is dropped for a random part of the sequences.

    `sample` computes all sequences and drops each independently. `subset` (DINOv2)
    runs the branch on max(1, int(B (1 - rate))) random sequences of each group and on nothing
    else, so that dropped work costs no time. Both divide by the kept share.
    """
    if rate == 0.0 or mode == "sample":
        return x + drop_path(branch(x, packing), packing, rate, dtype=x.dtype)
    if packing is None:
        return _add_on_subset(x, branch, 1.0 - rate)
    return _add_on_packed_subset(x, branch, packing, 1.0 - rate)


def drop_path(
    update: Tensor, packing: Packing | None, rate: float, *, dtype: torch.dtype
) -> Tensor:
    """Drop path: zero whole sequences of a branch's result at random, divide by the kept share.

    Computed in `dtype`, that of the tokens it is added to: a branch in half precision would round
    the divisor.
    """
    if rate == 0.0:
        return update
    return update * drawn_factors(update, packing, rate, dtype=dtype)


def drawn_factors(x: Tensor, packing: Packing | None, rate: float, *, dtype: torch.dtype) -> Tensor:
    """What drop path multiplies tokens [B T D] by, 0 or 1 / (1 - rate): [B 1 1], packed [1 T 1]."""
    count, keep = x.shape[0] if packing is None else packing.num_sequences, 1.0 - rate
    mask = x.new_empty(count, dtype=dtype).bernoulli_(keep)
    if keep > 0.0:
        mask = mask / keep
    if packing is None:
        return mask[:, None, None]
    parts, first = [], 0
    for sequences, tokens in packing.groups:
        parts.append(mask[first : first + sequences].repeat_interleave(tokens))
        first += sequences
    return torch.cat(parts)[None, :, None]


def kept_of(count: int, keep: float) -> int:
    """How many of `count` sequences mode `subset` computes."""
    return min(count, max(1, int(count * keep)))


def _add_on_subset(x: Tensor, branch: Branch, keep: float) -> Tensor:
    kept = kept_of(x.shape[0], keep)
    chosen = torch.randperm(x.shape[0], device=x.device)[:kept]
    update = branch(x[chosen], None)
    return x.index_add(0, chosen, update.to(x.dtype), alpha=x.shape[0] / max(1, kept))


def _add_on_packed_subset(x: Tensor, branch: Branch, packing: Packing, keep: float) -> Tensor:
    rows, groups, first = [], [], 0
    for count, tokens in packing.groups:
        kept = kept_of(count, keep)
        chosen = torch.randperm(count, device=x.device)[:kept]
        within = torch.arange(tokens, device=x.device)
        rows.append((first + chosen[:, None] * tokens + within).flatten())
        groups.append((kept, tokens))
        first += count * tokens
    index = torch.cat(rows)
    update = branch(x[:, index], make_packing(groups, x.device)).to(x.dtype)
    scaled = [
        part * (count / max(1, kept))
        for part, (count, _), (kept, _) in zip(
            unpack(update, groups), packing.groups, groups, strict=True
        )
    ]
    return x.index_add(1, index, torch.cat([part.flatten(0, 1) for part in scaled])[None])


def check_mode(mode: str) -> None:
    """Refuse an unknown way of dropping branches."""
    if mode not in MODES:
        raise ValueError(f"unknown drop_path_mode {mode!r}; known: {', '.join(MODES)}")
