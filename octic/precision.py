"""What autocast, and who chose the format of float32 products, ask of our operators."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants products of x in; None where it is off or leaves float64 be."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(function: Callable, x: Tensor, *arguments: Any) -> Any:
    """function(x, ...) in the dtypes that it chooses itself."""
    if autocast_dtype(x) is None:
        return function(x, *arguments)
    with torch.autocast(x.device.type, enabled=False):
        return function(x, *arguments)


def float32_products() -> str:
    """What the user wants float32 products on CUDA in: `ieee`, exact, or `tf32`."""
    # torch.get_float32_matmul_precision() raises where this very setting was used.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
