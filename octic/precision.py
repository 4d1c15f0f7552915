"""What autocast asks of our operators."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants matrix products in on x's device; None where it is off."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(function: Callable, x: Tensor, *arguments: Any) -> Any:
    """function(x, ...) in the dtypes that it chooses itself."""
    if autocast_dtype(x) is None:
        return function(x, *arguments)
    with torch.autocast(x.device.type, enabled=False):
        return function(x, *arguments)
