"""Constant tables of a module: exact, on its device, and in no file of weights.

Made anew from the host's numbers in every call, a table would be a copy that the host waits for.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Tables(nn.Module):
    """Base of modules that hold constant arrays as buffers, none of them in the state dict."""

    def hold_tables(self, **arrays: np.ndarray) -> None:
        """Register each array as a buffer of its name and dtype."""
        self._arrays = arrays
        for name, array in arrays.items():
            self.register_buffer(name, torch.tensor(array), persistent=False)

    def table(self, name: str, beside: Tensor) -> Tensor:
        """The table of that name, on the device of `beside`."""
        if getattr(self, name).is_meta and not beside.is_meta:  # weights came with assign=True
            self._fill(beside.device)
        return getattr(self, name)

    def _fill(self, device: torch.device) -> None:
        for name, array in self._arrays.items():
            setattr(self, name, torch.tensor(array, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Refill the tables after every move. A net built on `meta` gets empty tensors (`to_empty`),
        # and a cast of the model would round them.
        super()._apply(fn, recurse)
        device = getattr(self, next(iter(self._arrays))).device
        if device.type != "meta":
            self._fill(device)
        return self
