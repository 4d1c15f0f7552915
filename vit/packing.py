"""Sequences of several lengths as one: crops of all sizes go through a block together.

A packed tensor is [1, sum of lengths, D]; sequences of equal length stand side by side, so a
packing is a short tuple of (number of sequences, tokens in each).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Which tokens of a packed tensor [1 T D] belong together."""

    groups: tuple[tuple[int, int], ...]  # (sequences, tokens of each), in order
    offsets: Tensor  # [number of sequences + 1] int32: where each sequence begins, and the end

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(tokens for _, tokens in self.groups)

    @property
    def num_sequences(self) -> int:
        """How many sequences are packed."""
        return sum(count for count, _ in self.groups)


def make_packing(groups: Sequence[tuple[int, int]], device: torch.device) -> Packing:
    """Describe sequences of the given (count, tokens) groups; offsets are made on the device."""
    starts, begin = [], 0
    for count, tokens in groups:
        # Arithmetic on the device: a list of Python numbers would be copied to it in every block.
        starts.append(begin + tokens * torch.arange(count, device=device, dtype=torch.int32))
        begin += count * tokens
    starts.append(torch.full((1,), begin, device=device, dtype=torch.int32))
    return Packing(tuple(groups), torch.cat(starts))


def pack(batches: Sequence[Tensor]) -> tuple[Tensor, Packing]:
    """Join batches of tokens [Bi Ti D] into one packed tensor [1 sum(Bi Ti) D]."""
    groups = [(batch.shape[0], batch.shape[1]) for batch in batches]
    joined = torch.cat([batch.flatten(0, 1) for batch in batches])
    return joined[None], make_packing(groups, joined.device)


def unpack(x: Tensor, groups: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Split a packed tensor [1 T ...] into its groups [Bi Ti ...], as views."""
    parts = x.squeeze(0).split([count * tokens for count, tokens in groups])
    return [part.unflatten(0, group) for part, group in zip(parts, groups, strict=True)]
