"""The equivariant matrix product as one operator: every irrep reads and writes its own columns.

All one-dimensional irreps are one batched product, the rows of the two-dimensional one another;
both write straight into the result, so nothing is copied together. Operators of torch (namespace
`octic`), forward and backward; FLOP counters count their multiply-adds. On CUDA cuBLAS
multiplies, and a Triton kernel adds the bias (`triton_bias`). In half precision Triton kernels sum
up the weights' gradients (`triton_weights`) and multiply where irreps are too narrow for cuBLAS
(`triton_linear`). The variable OCTIC_LINEAR chooses otherwise: `products`, cuBLAS for all, or
`triton` for all.

Letters: M tokens, L one-dimensional irreps of C channels, R rows of Q channels.
"""

import math
import os
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from octic import composed
from octic.device import HAS_TRITON, multiplies_tiles, runs_triton
from octic.operators import launch, operator
from octic.precision import autocast_dtype

NARROW = 64  # channels per copy; narrower products are faster in one Triton kernel (on an H200)


def irrep_linear(
    x: Tensor,
    lines: Tensor,
    plane: Tensor | None,
    bias: Tensor | None,
    *,
    add_bias: bool = True,
) -> Tensor:
    """Map features [... L C + R Q] to [... L C' + R Q'] by one matrix for each irrep.

    lines [L C' C]; plane [Q' Q], shared by its R rows; bias [C'] on the first irrep. Under
    autocast all are cast to its dtype, as torch's own linear does. With add_bias=False the result
    lacks the bias, which the next operator is to add detached: its gradient is computed here in any
    case, together with those of the matrices.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, lines = x.to(dtype), lines.to(dtype)
        plane = None if plane is None else plane.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if composed.is_composed():
        return composed.linear(x, lines, plane, bias, add_bias=add_bias)
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if torch.is_grad_enabled():
        y = _Linear.apply(flat, lines, plane, bias, add_bias)
    else:
        y = _linear(flat, lines, plane, bias if add_bias else None)
    return y.view(*x.shape[:-1], y.shape[-1])


def _columns(x: Tensor, lines: Tensor, plane: Tensor | None, side: int) -> tuple[Tensor, Tensor]:
    """Views [L M C] and [R M Q] of x [M D]; side -1 for inputs, -2 for outputs."""
    (rows, width), (row_stride, stride) = x.shape, x.stride()
    count, channels = lines.shape[0], lines.shape[side]
    split = count * channels
    deep = 0 if plane is None else plane.shape[side]
    start = x.storage_offset()
    first = x.as_strided((count, rows, channels), (channels * stride, row_stride, stride), start)
    planes = (width - split) // deep if deep else 0
    strides, start = (deep * stride, row_stride, stride), start + split * stride
    return first, x.as_strided((planes, rows, deep), strides, start)


def _width(x: Tensor, lines: Tensor, plane: Tensor | None, given: int, wanted: int) -> int:
    """Channels on one side of the map, from those on the other."""
    width = lines.shape[0] * lines.shape[wanted]
    if plane is None:
        return width
    rows = (x.shape[1] - lines.shape[0] * lines.shape[given]) // plane.shape[given]
    return width + rows * plane.shape[wanted]


@operator("irrep_linear(Tensor x, Tensor lines, Tensor? plane, Tensor? bias) -> Tensor")
def _linear(x: Tensor, lines: Tensor, plane: Tensor | None, bias: Tensor | None) -> Tensor:
    if _uses_triton(x, worth=_is_narrow(lines)):
        return launch("triton_linear.forward", x, x, lines, plane, bias)
    out = x.new_empty(x.shape[0], _width(x, lines, plane, given=-1, wanted=-2))
    x_lines, x_rows = _columns(x, lines, plane, -1)
    out_lines, out_rows = _columns(out, lines, plane, -2)
    torch.bmm(x_lines, lines.transpose(1, 2), out=out_lines)
    if plane is not None:
        torch.bmm(x_rows, plane.t().expand(x_rows.shape[0], -1, -1), out=out_rows)
    if bias is not None:
        _add_bias(out, out_lines[0], bias)
    return out


def _add_bias(out: Tensor, first: Tensor, bias: Tensor) -> None:
    if runs_triton(out):
        launch("triton_bias.add", out, out, bias)
    else:
        first.add_(bias)


@operator("irrep_linear_backward_input(Tensor grad, Tensor lines, Tensor? plane) -> Tensor")
def _backward_input(grad: Tensor, lines: Tensor, plane: Tensor | None) -> Tensor:
    if _uses_triton(grad, worth=_is_narrow(lines)):
        return launch("triton_linear.backward_input", grad, grad, lines, plane)
    out = grad.new_empty(grad.shape[0], _width(grad, lines, plane, given=-2, wanted=-1))
    grad_lines, grad_rows = _columns(grad, lines, plane, -2)
    out_lines, out_rows = _columns(out, lines, plane, -1)
    torch.bmm(grad_lines, lines, out=out_lines)
    if plane is not None:
        torch.bmm(grad_rows, plane.expand(grad_rows.shape[0], -1, -1), out=out_rows)
    return out


@operator(
    "irrep_linear_backward_weight(Tensor grad, Tensor x, Tensor lines, Tensor? plane)"
    " -> (Tensor, Tensor, Tensor)"
)
def _backward_weight(
    grad: Tensor, x: Tensor, lines: Tensor, plane: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if _uses_triton(grad, worth=True):
        return launch("triton_weights.backward", grad, grad, x, lines, plane)
    x_lines, x_rows = _columns(x, lines, plane, -1)
    grad_lines, grad_rows = _columns(grad, lines, plane, -2)
    d_lines = torch.bmm(grad_lines.transpose(1, 2), x_lines)
    if plane is None:
        d_plane = x.new_empty(0)
    else:
        d_plane = torch.bmm(grad_rows.transpose(1, 2), x_rows).sum(0)
    return d_lines, d_plane, grad_lines[0].sum(0)


def _uses_triton(x: Tensor, *, worth: bool) -> bool:
    """Whether a Triton kernel multiplies: OCTIC_LINEAR asks for it, or it is `worth` it.

    The latter only in half precision and on devices whose matrix units Triton uses.
    """
    if not x.is_cuda or x.dtype == torch.float64:
        return False
    kernel = linear_kernel()
    if kernel == "triton" and not HAS_TRITON:
        raise ValueError(
            "OCTIC_LINEAR=triton needs the package triton; OCTIC_LINEAR=products needs nothing"
        )
    if kernel == "triton":
        return True
    worth = worth and x.dtype.itemsize == 2 and kernel == "auto"
    return worth and multiplies_tiles(x.device) and runs_triton(x)


def _is_narrow(lines: Tensor) -> bool:
    return min(lines.shape[1:]) < NARROW


def linear_kernel() -> str:
    """What multiplies on CUDA, by OCTIC_LINEAR: `auto`, `products` (cuBLAS) or `triton`."""
    name = os.environ.get("OCTIC_LINEAR", "auto")
    if name not in ("auto", "products", "triton"):
        raise ValueError(f"OCTIC_LINEAR={name} is unknown; known: auto, products, triton")
    return name


@torch.library.register_fake("octic::irrep_linear")
def _(x: Tensor, lines: Tensor, plane: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], _width(x, lines, plane, given=-1, wanted=-2))


@torch.library.register_fake("octic::irrep_linear_backward_input")
def _(grad: Tensor, lines: Tensor, plane: Tensor | None) -> Tensor:
    return grad.new_empty(grad.shape[0], _width(grad, lines, plane, given=-2, wanted=-1))


@torch.library.register_fake("octic::irrep_linear_backward_weight")
def _(
    grad: Tensor, x: Tensor, lines: Tensor, plane: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    d_plane = x.new_empty(0) if plane is None else plane.new_empty(plane.shape)
    return lines.new_empty(lines.shape), d_plane, x.new_empty(lines.shape[1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lines: Tensor,
        plane: Tensor | None,
        bias: Tensor | None,
        add_bias: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, lines, plane)
        ctx.biased = bias is not None
        return _linear(x, lines, plane, bias if add_bias else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, lines, plane = ctx.saved_tensors
        if composed.is_differentiated_again():
            # The bias is added: its gradient does not depend on it.
            bias = lines.new_zeros(lines.shape[1], requires_grad=True) if ctx.biased else None
            inputs, wanted = (x, lines, plane, bias), ctx.needs_input_grad[:4]
            return *composed.gradients(composed.linear, inputs, wanted, grad), None
        grad = grad.contiguous()
        d_x = _backward_input(grad, lines, plane) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return d_x, None, None, None, None
        d_lines, d_plane, d_bias = _backward_weight(grad, x, lines, plane)
        d_plane = None if plane is None else d_plane
        return d_x, d_lines, d_plane, d_bias if ctx.biased else None, None


def _flops(x: Any, lines: Any, plane: Any, side: int) -> int:
    """Floating-point operations for the shapes of an input (side -1) or a gradient (side -2)."""
    per_token = lines[0] * lines[1] * lines[2]
    if plane is not None:
        rows = (x[1] - lines[0] * lines[side]) // plane[side]
        per_token += rows * plane[0] * plane[1]
    return 2 * x[0] * per_token


@register_flop_formula(torch.ops.octic.irrep_linear)
def _(x: Any, lines: Any, plane: Any, *_: Any, **__: Any) -> int:
    return _flops(x, lines, plane, -1)


@register_flop_formula(torch.ops.octic.irrep_linear_backward_input)
def _(grad: Any, lines: Any, plane: Any, *_: Any, **__: Any) -> int:
    return _flops(grad, lines, plane, -2)


@register_flop_formula(torch.ops.octic.irrep_linear_backward_weight)
def _(grad: Any, x: Any, lines: Any, plane: Any, *_: Any, **__: Any) -> int:
    return _flops(grad, lines, plane, -2)
