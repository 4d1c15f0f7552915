"""What a device can do, and whether Triton kernels run there."""

import warnings
from functools import cache, lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None


def takes_triton(x: Tensor) -> bool:
    """Whether a Triton kernel can compute on x: CUDA, not float64, and triton is installed."""
    return x.is_cuda and x.dtype != torch.float64 and HAS_TRITON


def runs_triton(x: Tensor) -> bool:
    """Whether a Triton kernel will compute on x; else the operator uses its PyTorch twin."""
    return takes_triton(x) and _triton_starts()


@cache
def _triton_starts() -> bool:
    """Whether Triton can launch kernels here: it needs a C compiler and a writable cache."""
    from triton.runtime import driver

    try:
        driver.active.get_current_device()
    except Exception as error:  # no compiler, no Python.h, no cache that can be written, ...
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        warnings.warn(
            f"octic layers run without their Triton kernels, slower: {reason}", stacklevel=2
        )
        return False
    return True


@lru_cache(maxsize=64)
def multiplies_tiles(device: torch.device) -> bool:
    """Whether Triton's products reach the matrix units of a CUDA device: from Ampere (8.0) on."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 for a CPU, where Triton's interpreter runs."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
