"""The moving average of a network: one of the same make that follows it, step by step."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

Place = tuple[dict[str, Any], str]


class Held:
    """The parameters of a module, and the buffers of its state dict, each tensor once.

    Walking all modules costs milliseconds, so the places are looked up once. What lies there is
    read at each call: tensors may be moved, sharded or loaded meanwhile, modules may not change.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters: list[Place] = []
        self._buffers: list[Place] = []
        seen: set[int] = set()
        for part in module.modules():
            lost = part._non_persistent_buffers_set
            kept = [name for name in part._buffers if name not in lost]
            self._parameters += _new_places(part._parameters, part._parameters, seen)
            self._buffers += _new_places(part._buffers, kept, seen)

    def parameters(self) -> list[Tensor]:
        """Parameters in the order of the module."""
        return [holder[name] for holder, name in self._parameters]

    def buffers(self) -> list[Tensor]:
        """Buffers in the order of the module, without those that no file holds (tables)."""
        return [holder[name] for holder, name in self._buffers]


def _new_places(holder: dict[str, Any], names: Iterable[str], seen: set[int]) -> list[Place]:
    """Places of tensors not `seen` so far."""
    places = []
    for name in names:
        tensor = holder[name]
        if tensor is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            places.append((holder, name))
    return places


class MovingAverage:
    """What `average` holds goes a part of the way to what `of` holds; whole numbers are copied."""

    def __init__(self, average: nn.Module, of: nn.Module) -> None:
        self._average, self._of = Held(average), Held(of)

    @torch.no_grad()
    def update(self, share: float) -> None:
        """Go this share of the way, 0 to 1."""
        torch._foreach_lerp_(self._average.parameters(), self._of.parameters(), share)
        for ours, theirs in zip(self._average.buffers(), self._of.buffers(), strict=True):
            if ours.is_floating_point():
                ours.lerp_(theirs, share)
            else:
                ours.copy_(theirs)
