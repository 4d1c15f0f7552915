"""Which dtype our operators compute in: under autocast, and for float32 products on CUDA."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts products of x to; None where it is off, and for float64."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(function: Callable, x: Tensor, *arguments: Any) -> Any:
    """Call function(x, ...) with autocast off, so that its own choice of dtypes counts."""
    if autocast_dtype(x) is None:
        return function(x, *arguments)
    with torch.autocast(x.device.type, enabled=False):
        return function(x, *arguments)


def float32_products() -> str:
    """The format of float32 products on CUDA by torch's settings: `ieee` (exact) or `tf32`."""
    # torch.get_float32_matmul_precision() raises where the newer setting, read here, was used.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
