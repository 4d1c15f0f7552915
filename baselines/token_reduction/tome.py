"""ToMe: in every block the most similar tokens are merged, none is dropped.

Bolya et al. 2023, "Token Merging: Your ViT But Faster", section 3.

Letters in shapes: B images, T tokens, P prefix tokens, M merged tokens in number (r), U those left
over, G targets, H heads, d channels of a head, C channels of whatever is merged.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from baselines.selection import rows_of
from baselines.token_reduction.options import each
from baselines.token_reduction.reducer import Attended, Facts, Reducer, State
from utils.precision import at_least_float32
from utils.ranges import check_count, check_flags, check_range, check_word

MODES = ("mean", "sum", "amax")


class Matching(NamedTuple):
    """Which tokens are merged into which; indices are positions before the merge."""

    unmerged: Tensor  # [B U] tokens that stay alone, in their new order
    sources: Tensor  # [B M] tokens that are merged
    targets: Tensor  # [B G] tokens that others may be merged into
    chosen: Tensor  # [B M] for each source the number of its target in `targets`
    order: Tensor | None = None  # [U + G] places of [unmerged, targets] in the output


def match_bipartite(
    metric: Tensor, r: int, *, protected_even: int = 0, protected_odd: int = 0
) -> Matching | None:
    """Bipartite soft matching on metric [B T d]: even positions find their most similar odd one.

    The r most similar even tokens are merged. protected_even, protected_odd: how many leading even
    and odd positions are never merged, nor merged into; they stay in front. None if r, cut to half
    of the free tokens, is 0.
    """
    batch, num_tokens, _ = metric.shape
    r = min(r, (num_tokens - protected_even - protected_odd) // 2)
    if r <= 0:
        return None
    with torch.no_grad():
        unit = metric / metric.norm(dim=-1, keepdim=True)
        scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
        if protected_even:
            scores = scores.index_fill(
                1, torch.arange(protected_even, device=metric.device), -torch.inf
            )
        if protected_odd:
            scores = scores.index_fill(
                2, torch.arange(protected_odd, device=metric.device), -torch.inf
            )
        best, partner = scores.max(dim=-1)
        # Not stable: ties are in the framework's order, as in the published code.
        ranked = best.argsort(dim=-1, descending=True)
        sources, alone = ranked[:, :r], ranked[:, r:]
        if protected_even:
            alone = alone.sort(dim=1).values
        targets = torch.arange(1, num_tokens, 2, device=metric.device).expand(batch, -1)
        return Matching(
            unmerged=2 * alone,
            sources=2 * sources,
            targets=targets,
            chosen=partner.gather(1, sources),
            order=_front_order(alone.shape[1], targets.shape[1], protected_even, protected_odd).to(
                metric.device
            )
            if protected_odd
            else None,
        )


def match_every_kth(metric: Tensor, k: int) -> Matching | None:
    """Each other token is merged into the most similar k-th token; None for k below 2.

    Tokens after the last multiple of k are lost.
    """
    if k < 2:
        return None
    batch, device = metric.shape[0], metric.device
    places = torch.arange(metric.shape[1] // k * k, device=device)
    is_target = places % k == k - 1
    with torch.no_grad():
        unit = metric / metric.norm(dim=-1, keepdim=True)
        sources, targets = places[~is_target], places[is_target]
        chosen = (unit[:, sources] @ unit[:, targets].transpose(1, 2)).argmax(dim=-1)
    return Matching(
        unmerged=places[:0].expand(batch, -1),
        sources=sources.expand(batch, -1),
        targets=targets.expand(batch, -1),
        chosen=chosen,
    )


def merge(matching: Matching, x: Tensor, mode: str = "mean") -> Tensor:
    """Rows of x [B T C] merged: [B U+G C], the unmerged first, then the targets.

    mode: mean of a target and its sources, their sum, or their largest value (amax).
    """
    check_word("mode", mode, MODES)
    index = matching.chosen[..., None].expand(-1, -1, x.shape[-1])
    merged = rows_of(x, matching.targets).scatter_reduce(
        1, index, rows_of(x, matching.sources), reduce=mode, include_self=True
    )
    out = torch.cat([rows_of(x, matching.unmerged), merged], dim=1)
    return out if matching.order is None else out[:, matching.order]


def unmerge(matching: Matching, y: Tensor) -> Tensor:
    """Rows of y [B U+G C] at their original places [B T C], sources with their targets' values."""
    if matching.order is not None:
        y = y[:, matching.order.argsort()]
    alone, merged = y.split([matching.unmerged.shape[1], matching.targets.shape[1]], dim=1)
    rows = torch.cat([alone, merged, rows_of(merged, matching.chosen)], dim=1)
    places = torch.cat([matching.unmerged, matching.targets, matching.sources], dim=1)
    index = places[..., None].expand(-1, -1, y.shape[-1])
    return torch.zeros_like(rows).scatter(1, index, rows)


def merge_weighted(matching: Matching, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Size-weighted mean of x [B T C], and the new sizes; size [B T 1] counts patches."""
    total = merge(matching, size, "sum")
    return merge(matching, x * size.to(x.dtype), "sum") / total.to(x.dtype), total


def merge_source(matching: Matching, source: Tensor) -> Tensor:
    """Which of the first tokens each one contains, 0 or 1: source [B T T0] to [B U+G T0]."""
    return merge(matching, source, "amax")


def merged_places(matching: Matching) -> Tensor:
    """Where each token goes [B T]."""
    batch, count = matching.unmerged.shape[0], matching.unmerged.shape[1]
    number = count + matching.targets.shape[1]
    places = torch.arange(number, device=matching.targets.device).expand(batch, -1)
    return unmerge(matching, places[..., None]).squeeze(-1)


def make_schedule(r: "int | Sequence[int]", depth: int, inflection: float = 0.0) -> list[int]:
    """Tokens merged in each of `depth` blocks: r everywhere, or falling or rising around it.

    inflection in [-1, 1]: from r (1 - f) in the first block to r (1 + f) in the last. A list is
    used as it is, with zeros behind it.
    """
    given = _checked(r, inflection)
    if not isinstance(r, int):
        if len(given) > depth:
            raise ValueError(f"a schedule of {len(given)} blocks for a network of {depth}")
        return given + [0] * (depth - len(given))
    low = int(r * (1.0 - inflection))
    step = (2 * r - 2 * low) / max(depth - 1, 1)
    return [int(low + step * index) for index in range(depth)]


class ToMe(Reducer):
    """Merges r pairs of tokens in each block, between attention and MLP.

    r: tokens merged in each (plain) block, or a list with a number for every block of the network.
    inflection: slope of the schedule, see `make_schedule`; -1 merges twice as many at first and
        none at the end.
    proportional: whether attention counts a token as often as it has patches (log size on every
        score); off for masked autoencoders.
    trace_source: whether `inspect` also records the 0/1 map of tokens to first tokens.
    weighs_mean: whether a network without class token takes the mean of its patches, as before, or,
        as published for SWAG, that of the tokens that are left.
    All prefix tokens are protected. Departs from the published code, which protects the class and
    distillation tokens alone and merges registers.
    Record: block<i>.unmerged [B U] and .sources [B M] among the even positions, .chosen [B M] among
    the odd ones; size [B T 1]; source [B T T0].
    """

    def __init__(
        self,
        r: "int | Sequence[int]" = 8,
        *,
        inflection: float = 0.0,
        proportional: bool = True,
        trace_source: bool = False,
        weighs_mean: bool = True,
    ) -> None:
        check_flags(proportional=proportional, trace_source=trace_source, weighs_mean=weighs_mean)
        given = _checked(r, inflection)
        self.r, self.inflection = r if isinstance(r, int) else given, inflection
        self.proportional, self.trace_source = proportional, trace_source
        self.weighs_mean = weighs_mean
        self.schedule: list[int] = []
        self.start_of_bias = 0

    def bind(self, facts: Facts) -> None:
        """Fit the options to a network; ValueError for merges in octic blocks."""
        super().bind(facts)
        if isinstance(self.r, int):
            plain = make_schedule(self.r, facts.depth - facts.first, self.inflection)
            self.schedule = [0] * facts.first + plain
        else:
            self.schedule = make_schedule(self.r, facts.depth)
        if any(self.schedule[: facts.first]):
            raise ValueError(
                f"r merges tokens in blocks 0 to {facts.first - 1}, which are octic and stay as "
                f"they are; the plain ones are {facts.first} to {facts.depth - 1}"
            )
        merging = [index for index, count in enumerate(self.schedule) if count > 0]
        self.start_of_bias = merging[0] if merging else facts.depth

    def start(self, state: State, x: Tensor) -> None:
        """Every token is its own source."""
        if self.trace_source and state.record is not None:
            eye = torch.eye(x.shape[1], device=x.device, dtype=x.dtype)
            state.memory["source"] = eye.expand(len(x), -1, -1)

    def works_inside(self, index: int) -> bool:
        """In blocks that merge tokens, and after the first one if attention uses sizes."""
        biased = self.proportional and index > self.start_of_bias
        return self.schedule[index] > 0 or biased

    def after_attention(
        self, state: State, index: int, x: Tensor, attended: Attended, k: Tensor
    ) -> Tensor:
        """The merged tokens; two are alike by the cosine of their keys' mean over heads."""
        first = state.num_prefix
        matching = match_bipartite(
            k.mean(dim=1),
            self.schedule[index],
            protected_even=(first + 1) // 2,
            protected_odd=first // 2,
        )
        if matching is None:
            return x
        state.note(f"block{index}.unmerged", matching.unmerged // 2)
        state.note(f"block{index}.sources", matching.sources // 2)
        state.note(f"block{index}.chosen", matching.chosen)
        if state.traced:
            state.move(merged_places(matching), x)
        if "source" in state.memory:
            state.memory["source"] = merge_source(matching, state.memory["source"])
            state.note("source", state.memory["source"])
        size = state.size
        if size is None:
            # Counts, which half precision cannot hold beyond 2048.
            size = at_least_float32(x.new_ones(*x.shape[:2], 1))
        x, state.size = merge_weighted(matching, x, size)
        if self.proportional:
            state.key_bias = state.size.log()[:, None, None, :, 0]
        state.note("size", state.size)
        return x


def _checked(r: "int | Sequence[int]", inflection: float) -> list[int]:
    """The number r, or the numbers; ValueError for other things, and a slope of given numbers."""
    given = each("r", r, check_count)
    check_range("inflection", inflection, -1.0, 1.0)
    if inflection and not isinstance(r, int):
        raise ValueError(
            "r lists the number of every block, so inflection has nothing to slope; give one of "
            "them"
        )
    return given


def _front_order(alone: int, targets: int, even: int, odd: int) -> Tensor:
    """Places of [unmerged, targets] so that protected ones alternate in front, as they stood."""
    count = max(even, 1)
    front: list[int] = []
    for index in range(count):
        front.append(index)
        if index < odd:
            front.append(alone + index)
    rest = [place for place in range(alone + targets) if place not in set(front)]
    return torch.tensor(front + rest)
