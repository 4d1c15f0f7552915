"""How operators of the namespace `octic` are made, so that calling one costs little.

A small net, and any net on a fast device, waits for the host, which launches one operator after
another. `torch.library.custom_op` with `register_autograd` costs the host several times what the
calls cost here, and an octic block makes nine of them (two norms, four products, split and join of
heads, a GELU), on CUDA one more for its matrices (docs/performance.md has the figures).
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


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


def launch(name: str, beside: Tensor, *arguments: Any) -> Any:
    """Call `octic.<module>.<function>` by its name, on the CUDA device of `beside`.

    The module, of Triton kernels, loads at its first use: it cannot where triton is not installed.
    """
    module, function = name.split(".")
    with torch.cuda.device_of(beside):
        return getattr(import_module(f"octic.{module}"), function)(*arguments)


def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor without gaps, as kernels read it, where there is one."""
    return None if tensor is None else tensor.contiguous()


def multiplies_nothing(*operators: Any) -> None:
    """Register operators with torch's FLOP counter as elementwise work, which counts 0."""
    register_flop_formula(list(operators))(lambda *shapes, **_: 0)


def channels_of_copies(x: Tensor, order: int) -> int:
    """C of a feature [... G C]; ValueError where G = `order` does not divide its width."""
    if x.shape[-1] % order:
        raise ValueError(f"{x.shape[-1]} channels are not a multiple of the group's order {order}")
    return x.shape[-1] // order
