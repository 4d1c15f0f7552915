"""Evo-ViT: tokens that the class token attends to run through the block, the others bypass it.

Xu et al. 2022, "Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer".

Letters in shapes: B images, P prefix tokens, N patch tokens, S slow ones, H heads, d channels of a
head, D channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from baselines.selection import class_attention, rows_of
from baselines.token_reduction.options import each
from baselines.token_reduction.reducer import (
    Attended,
    Facts,
    Reducer,
    State,
    check_blocks,
    check_class_token,
)
from utils.ranges import check_count, check_flags, check_rate, check_share


def sort_tokens(patches: Tensor, attention: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patch tokens [B N D] and their class attention [B N] by falling attention, and the order.

    Ties are in the framework's order, as in the published code.
    """
    order = attention.argsort(dim=1, descending=True)
    return rows_of(patches, order), attention.gather(1, order), order


def update_attention(old: Tensor, new: Tensor, tradeoff: float) -> Tensor:
    """Running class attention (section 3.2): (1 - tradeoff) old + tradeoff new."""
    return (1 - tradeoff) * old + tradeoff * new


def representative(patches: Tensor, attention: Tensor) -> Tensor:
    """One token [B 1 D] for patches [B M D]: their mean, weighted by class attention [B M]."""
    shares = attention / attention.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return shares[:, None].to(patches.dtype) @ patches


class EvoViT(Reducer):
    """From a block on, only a share of the patch tokens runs through each block; none is lost.

    location: the first such block, behind at least one plain block. Default: a third of the way.
    keep_rate: share of all patches that runs through it, or a list with one for every block, which
        sets the location too.
    tradeoff: weight of a block's own class attention in the running one, or a list.
    fast_update: whether a token that stands for the others runs with the chosen ones, and what the
        block adds to it is added to the others (the paper). Off: they pass unchanged, which is
        what Expedit-SWAG measured.
    Departs from Expedit-SWAG: can be trained, and works where it crashed.
    Record: block<i>.order [B N] and block<i>.class_attention [B N] behind the block, the latter
    also where every block keeps all tokens.
    """

    watches = True

    def __init__(
        self,
        location: int | None = None,
        keep_rate: "float | Sequence[float]" = 0.5,
        *,
        tradeoff: "float | Sequence[float]" = 0.5,
        fast_update: bool = True,
    ) -> None:
        check_flags(fast_update=fast_update)
        if location is not None:
            check_count("location", location)
        each("keep_rate", keep_rate, check_rate)
        each("tradeoff", tradeoff, check_share)
        if location is not None and not isinstance(keep_rate, int | float):
            raise ValueError("location and a list as keep_rate both say where; give one of them")
        self.location, self.keep_rate = location, keep_rate
        self.tradeoff, self.fast_update = tradeoff, fast_update
        self.rates: list[float] = []
        self.tradeoffs: list[float] = []

    def bind(self, facts: Facts) -> None:
        """Fit the options to a network; ValueError for a location with no plain block before it."""
        super().bind(facts)
        depth, first = facts.depth, facts.first
        check_class_token(facts, "Evo-ViT")
        if isinstance(self.keep_rate, int | float):
            start = first + max(1, (depth - first) // 3) if self.location is None else self.location
            if start != depth:
                check_blocks([start], facts, "location")
            self.rates = [1.0] * start + [float(self.keep_rate)] * (depth - start)
        else:
            self.rates = [float(rate) for rate in self.keep_rate]
        self.tradeoffs = (
            [float(self.tradeoff)] * depth
            if isinstance(self.tradeoff, int | float)
            else [float(share) for share in self.tradeoff]
        )
        for name, values in (("keep_rate", self.rates), ("tradeoff", self.tradeoffs)):
            if len(values) != depth:
                raise ValueError(f"{name} has {len(values)} entries for {depth} blocks")
        if any(rate < 1.0 for rate in self.rates[: first + 1]):
            raise ValueError(
                f"Evo-ViT selects by the class attention of the plain blocks before, so block "
                f"{first} must keep all tokens; location {first + 1} is the first possible"
            )

    def works_inside(self, index: int) -> bool:
        """In all blocks, if any block selects: each contributes to the running class attention."""
        return any(rate < 1.0 for rate in self.rates)

    def before_block(self, state: State, index: int, x: Tensor) -> Tensor:
        """The tokens that run through the block [B P+S(+1) D]; the others are kept in the state."""
        rate, first = self.rates[index], state.num_prefix
        if rate == 1.0:
            return x
        patches, attention, order = sort_tokens(x[:, first:], state.memory["attention"])
        if state.traced:
            batch = len(x)
            places = order.argsort(dim=1) + first
            prefix = torch.arange(first, device=x.device).expand(batch, -1)
            state.move(torch.cat([prefix, places], dim=1), x)
        state.note(f"block{index}.order", order)
        count = self._num_slow(state, index)
        slow, rest = patches[:, :count], patches[:, count:]
        state.memory |= {"attention": attention, "rest": rest}
        parts = [x[:, :first], slow]
        if self.fast_update and rest.shape[1]:
            stand_in = representative(rest, attention[:, count:])
            state.memory["stand_in"] = stand_in
            parts.append(stand_in)
        return torch.cat(parts, dim=1)

    def attend(
        self, state: State, index: int, q: Tensor, k: Tensor, v: Tensor, normed: Tensor
    ) -> Attended:
        """Ordinary attention; the class token's row updates the running one."""
        row = class_attention(q, k)[:, state.num_prefix :]
        known = state.memory.get("attention")
        if known is None:
            state.memory["attention"] = row
        else:
            count = known.shape[1] if self.rates[index] == 1.0 else self._num_slow(state, index)
            updated = update_attention(known[:, :count], row[:, :count], self.tradeoffs[index])
            state.memory["attention"] = torch.cat([updated, known[:, count:]], dim=1)
        state.note(f"block{index}.class_attention", state.memory["attention"])
        return Attended(self.softmax_attention(state, q, k, v))

    def after_block(self, state: State, index: int, x: Tensor) -> Tensor:
        """All tokens [B P+N D] again, the slow ones in front."""
        rest = state.memory.pop("rest", None)
        if rest is None:
            return x
        stand_in = state.memory.pop("stand_in", None)
        if stand_in is not None:
            x, moved = x[:, :-1], x[:, -1:]
            rest = rest + (moved - stand_in)
        return torch.cat([x, rest], dim=1)

    def _num_slow(self, state: State, index: int) -> int:
        return int(state.num_patches * self.rates[index])
