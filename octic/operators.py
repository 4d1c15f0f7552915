"""How operators of the namespace `octic` are made, so that calling one costs little.

A small net, and any net on a fast device, waits for the host, which launches one operator after
another. `torch.library.custom_op` with `register_autograd` costs the host several times what the
calls cost here, and an octic block makes seven of them (docs/performance.md has the figures).
"""

import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

HAS_TRITON = find_spec("triton") is not None


def operator(schema: str) -> Callable[[Callable], Callable]:
    """Register the function below as `octic::<schema>` on every device; returns the operator.

    The function must not change its arguments, nor return one of them or a view; tests prove it by
    `torch.library.opcheck`. The operator has no gradient of its own: call it within the forward
    pass of a `torch.autograd.Function`.
    """
    name, arguments = schema.split("(", 1)

    def register(function: Callable) -> Callable:
        tags = (torch.Tag.pt2_compliant_tag,)
        torch.library.define(f"octic::{name}", f"({arguments}", tags=tags)
        torch.library.impl(f"octic::{name}", "default")(function)
        return getattr(torch.ops.octic, name).default

    return register


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


def multiplies_nothing(*operators: Any) -> None:
    """Register operators with torch's FLOP counter as elementwise work, which counts 0."""
    register_flop_formula(list(operators))(lambda *shapes, **_: 0)


def channels_of_copies(x: Tensor, order: int) -> int:
    """C of a feature [... G C]; ValueError where G = `order` does not divide its width."""
    if x.shape[-1] % order:
        raise ValueError(f"{x.shape[-1]} channels are not a multiple of the group's order {order}")
    return x.shape[-1] // order


def ceil_div(count: int, size: int) -> int:
    """ceil(count / size); triton.cdiv takes 10 us when it is called outside of a kernel."""
    return -(-count // size)


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
