"""EViT: the patches that the class token attends to are kept, the others dropped or fused.

Liang et al. 2022, "Not All Patches Are What You Need: Expediting Vision Transformers via Token
Reorganizations".

Letters in shapes: B images, T tokens, P prefix tokens, N patch tokens of a block, K kept ones, H
heads, d channels of a head, D channels.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.selection import class_attention, keep_count, keep_tokens, most_important
from baselines.token_reduction.options import block_list, rates_of_blocks
from baselines.token_reduction.reducer import (
    Attended,
    Facts,
    Reducer,
    State,
    check_blocks,
    check_class_token,
)
from utils.ranges import check_flags, check_rate, check_word

SCORES = ("class", "all")
KEEP_RATE = 0.7  # the published one


class EViT(Reducer):
    """In some blocks, between attention and MLP, keeps a share of the patch tokens.

    keep_rate: share of the patch tokens that stay at each of the `locations`; 0.7 by default.
    locations: a block, or several. By default three, a quarter of the (plain) depth apart, as
        published.
    keep_rates: instead, the rate of every block, or of some as {block: rate}.
    fuse_token: whether the dropped ones become one additional token.
    score: what ranks a token: "class", the class token's attention to it (the paper); "all", that
        of all tokens (Expedit-SWAG).
    exact_counts: see `baselines.selection.keep_count`; false: as published.
    A fused token belongs to no patch: a dropped patch is restored with its own last value.
    Record: block<i>.score [B N], block<i>.kept [B K].
    """

    def __init__(
        self,
        keep_rate: float | None = None,
        locations: int | Sequence[int] | None = None,
        *,
        keep_rates: Sequence[float] | Mapping[int, float] | None = None,
        fuse_token: bool = True,
        score: str = "class",
        exact_counts: bool = True,
    ) -> None:
        check_word("score", score, SCORES)
        check_flags(fuse_token=fuse_token, exact_counts=exact_counts)
        if keep_rates is not None and locations is not None:
            raise ValueError("locations and keep_rates both say where; give one of them")
        if keep_rates is not None and keep_rate is not None:
            raise ValueError("keep_rate and keep_rates both say how many; give one of them")
        self.keep_rate = KEEP_RATE if keep_rate is None else keep_rate
        check_rate("keep_rate", self.keep_rate)
        self.locations = None if locations is None else block_list("locations", locations)
        self.keep_rates = None if keep_rates is None else rates_of_blocks("keep_rates", keep_rates)
        self.fuse_token, self.score, self.exact_counts = fuse_token, score, exact_counts
        self.rates: dict[int, float] = {}

    def bind(self, facts: Facts) -> None:
        """Fit the options to a network; ValueError for blocks or tokens that it lacks."""
        super().bind(facts)
        self.rates = {i: rate for i, rate in self._rate_of_blocks(facts).items() if rate < 1.0}
        check_blocks(list(self.rates), facts, "EViT block")
        if self.score == "class":
            check_class_token(facts, 'EViT with score "class" (score "all" does not)')

    def works_inside(self, index: int) -> bool:
        """In the blocks that drop tokens."""
        return index in self.rates

    def attend(
        self, state: State, index: int, q: Tensor, k: Tensor, v: Tensor, normed: Tensor
    ) -> Attended:
        """Ordinary attention, and the score of each token [B T]."""
        if self.score == "class":
            return Attended(self.softmax_attention(state, q, k, v), class_attention(q, k))
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        return Attended(F.dropout(weights, state.attn_drop) @ v, weights.mean(dim=(1, 2)))

    def after_attention(
        self, state: State, index: int, x: Tensor, attended: Attended, k: Tensor
    ) -> Tensor:
        """The tokens that stay [B P+K(+1) D]."""
        assert attended.scores is not None
        first = state.num_prefix
        scores = attended.scores[:, first:]
        count = keep_count(self.rates[index], scores.shape[1], exact=self.exact_counts)
        if count == scores.shape[1]:
            return x
        kept = most_important(scores, count)
        out = keep_tokens(x, kept, scores, num_prefix=first, fuse=self.fuse_token)
        state.note(f"block{index}.score", scores)
        state.note(f"block{index}.kept", kept)
        if state.traced:
            state.move(kept_places(kept, x.shape[1], first), x)
        return out

    def _rate_of_blocks(self, facts: Facts) -> dict[int, float]:
        if isinstance(self.keep_rates, dict):
            return self.keep_rates
        if self.keep_rates is not None:
            if len(self.keep_rates) != facts.depth:
                raise ValueError(
                    f"{len(self.keep_rates)} keep rates for {facts.depth} blocks; give one for each"
                )
            return dict(enumerate(self.keep_rates))
        locations = self.locations
        if locations is None:
            span = facts.depth - facts.first
            locations = sorted({facts.first + span * part // 4 for part in (1, 2, 3)})
        return dict.fromkeys(locations, self.keep_rate)


def kept_places(kept: Tensor, num_tokens: int, num_prefix: int) -> Tensor:
    """Where each of T tokens goes [B T] when the patch tokens `kept` [B K] stay in that order."""
    batch, count = kept.shape
    places = torch.full((batch, num_tokens), -1, dtype=torch.long, device=kept.device)
    prefix = torch.arange(num_prefix, device=kept.device).expand(batch, -1)
    order = torch.arange(count, device=kept.device).expand(batch, -1) + num_prefix
    source = torch.cat([prefix, kept + num_prefix], dim=1)
    return places.scatter(1, source, torch.cat([prefix, order], dim=1))
