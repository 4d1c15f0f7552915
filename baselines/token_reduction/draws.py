"""Random projections of hashing methods: stored, so that two passes agree; or drawn anew."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from baselines.token_reduction.options import check_counts

Draw = tuple[Tensor, Tensor]  # a Gaussian matrix [channels, hashes] and a shift in [0, 1) [hashes]


@dataclass
class Draws:
    """A projection for every block and role, from `seed`; None draws anew in every pass.

    Plain tensors on the CPU, no buffers: a checkpoint of the network stays that of the network.
    """

    seed: int | None = 0
    stored: dict[str, Draw] = field(default_factory=dict)

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


def check_draw(start: int | None, stop: int | None, seed: int | None) -> None:
    """ValueError for blocks or a seed that are not integers; -1 as `stop` means the end."""
    check_counts(start=start, seed=seed)
    check_counts(-1, stop=stop)


def block_range(start: int | None, stop: int | None, first: int, depth: int) -> range:
    """Blocks from start (default: the first plain one) to stop (default and -1: the end)."""
    begin = first if start is None else start
    end = depth if stop is None or stop == -1 else stop
    if not 0 <= begin <= end <= depth:
        raise ValueError(f"blocks {begin} to {end} (exclusive): the network has {depth}")
    return range(begin, end)
