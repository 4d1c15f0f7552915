"""What hashing methods share: the range of their blocks, and random projections."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from baselines.token_reduction.options import FORMS
from baselines.token_reduction.reducer import Facts, Reducer, check_blocks
from utils.ranges import check_count, check_word

Draw = tuple[Tensor, Tensor]  # a Gaussian matrix [channels, hashes] and a shift in [0, 1) [hashes]


@dataclass
class Draws:
    """A projection for every block and role, from `seed`; None draws anew in every pass.

    Stored, so that two passes agree, as plain tensors on the CPU, no buffers: a checkpoint of the
    network stays that of the network.
    """

    seed: int | None = 0
    stored: dict[str, Draw] = field(default_factory=dict, repr=False)

    def prepare(self, names: Iterable[str], channels: int, hashes: int) -> None:
        """Draw projections of these names, in place of any that another network had."""
        if self.seed is None:
            return
        generator = torch.Generator().manual_seed(self.seed)
        for name in names:
            gaussian = torch.randn(channels, hashes, generator=generator, device="cpu")
            shift = torch.rand(hashes, generator=generator, device="cpu")
            self.stored[name] = (gaussian, shift)

    def get(self, name: str, channels: int, hashes: int, like: Tensor) -> Draw:
        """The projection of that name, or a fresh one, with the dtype and device of `like`."""
        if name in self.stored:
            gaussian, shift = self.stored[name]
        else:
            gaussian = torch.randn(channels, hashes, device=like.device)
            shift = torch.rand(hashes, device=like.device)
        return gaussian.to(like.device, like.dtype), shift.to(like.device, like.dtype)


class HashedAttention(Reducer):
    """Base of attention by hashes in a range of blocks, no token of which is dropped.

    start, stop: the blocks, stop exclusive and -1 for the end; by default all plain ones.
    seed: of the projections; None draws them anew in every pass, as published.
    """

    title: str

    def __init__(self, start: int | None, stop: int | None, form: str, seed: int | None) -> None:
        check_word("form", form, FORMS)
        for key, value, least in (("start", start, 0), ("stop", stop, -1), ("seed", seed, 0)):
            if value is not None:
                check_count(key, value, least)
        self.start_block, self.stop_block = start, stop
        self.form, self.draws = form, Draws(seed)
        self.blocks: range = range(0)

    def bind(self, facts: Facts) -> None:
        """Fit the range to a network; ValueError for blocks that it lacks."""
        super().bind(facts)
        first = facts.first if self.start_block is None else self.start_block
        stop = facts.depth if self.stop_block in (None, -1) else self.stop_block
        if not 0 <= first <= stop <= facts.depth:
            raise ValueError(f"blocks {first} to {stop} (exclusive): the network has {facts.depth}")
        self.blocks = range(first, stop)
        check_blocks(list(self.blocks), facts, f"{self.title} block")

    def works_inside(self, index: int) -> bool:
        """Whether the block is in the range."""
        return index in self.blocks

    def check_training(self, attn_drop: float) -> None:
        """ValueError for dropout of attention weights, which clusters share."""
        if attn_drop > 0:
            raise ValueError(
                f"{self.title} trains without dropout of attention weights; attn_drop is "
                f"{attn_drop}, give 0"
            )
