"""The one contract between networks and everything that trains or judges them.

Letters in shapes: B images, N patches, h w their grid, R registers, T all tokens, D channels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn


class Features(NamedTuple):
    """Normalised output of one block: what every probe reads."""

    cls: Tensor  # [B D]; a network without a class token gives its pooled patches
    patches: Tensor | None  # [B h w D]; None when the network drops tokens


class Encoded(NamedTuple):
    """All tokens of the last block, by their kind: what self-supervised recipes read."""

    cls: Tensor  # [B D] after the final norm
    registers: Tensor  # [B R D] after the final norm
    patches: Tensor  # [B N D] after the final norm, rows of the grid one after the other
    prenorm: Tensor  # [B T D] before the final norm


@runtime_checkable
class Backbone(Protocol):
    """A network that turns images into features."""

    embed_dim: int
    patch_size: int

    def features(self, images: Tensor, layers: Sequence[int] = (-1,)) -> list[Features]:
        """Normalised features of the asked blocks; negative indices count from the end."""
        ...


def in_asked_order(entries: Sequence[Any], indices: Sequence[int]) -> list[Any]:
    """Reorder timm's outputs, one per distinct block, ascending, to the `indices` as asked."""
    found = dict(zip(sorted(set(indices)), entries, strict=True))
    return [found[index] for index in indices]


@contextmanager
def eval_mode(net: nn.Module) -> Iterator[None]:
    """Put a network into eval mode, and every part back into its own mode afterwards."""
    modes = [(part, part.training) for part in net.modules()]
    net.eval()
    try:
        yield
    finally:
        net.train(modes[0][1])  # a module may do more than set the flag, such as unmerge weights
        for part, mode in modes:
            part.training = mode


def check_counts(least: int, /, **counts: int) -> None:
    """ValueError unless each is a whole number from `least` on."""
    for key, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{key} must be a whole number of at least {least}, not {value!r}")
