"""The norm over irreps and the GELU on the regular basis, each as one operator.

They stand between the matrix products of an octic block. Each is a custom operator of torch
(namespace `octic`) forward and one backward. On CUDA a Triton kernel computes it (`triton_norm`,
`triton_gelu`); elsewhere, and in float64, a plain PyTorch twin does. Both compute in float32
(float64 for float64) and round once. `torch.compile` keeps the operators whole, autocast leaves
them alone, and FLOP counters count no multiply-adds for them.

Letters: N tokens, D = G C channels, G the order of the group, C channels per copy; a feature
[... D] is seen as [... G C].
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

Segments = tuple[tuple[int, float], ...]
Matrix = tuple[tuple[float, ...], ...]


def irrep_norm(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    segments: Segments,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Subtract each segment's mean, divide by the common deviation, then scale and shift.

    x [... D]; scale [D]; shift [C], added to the first C channels. Segments are consecutive
    channels, each (length in units of C, weight w): deviation^2 = (sum of w * var + eps) / G with
    biased variances. The result has x's dtype, or `dtype`, under autocast too and whatever the
    dtypes of scale and shift. Raises ValueError where shapes do not fit. Formula: octic-vits,
    LayerNormD8.
    """
    lengths = [length for length, _ in segments]
    channels = _channels(x, sum(lengths))
    for name, tensor, width in (("scale", scale, x.shape[-1]), ("shift", shift, channels)):
        if tensor is not None and tensor.shape != (width,):
            raise ValueError(
                f"irrep_norm: {name} has shape {[*tensor.shape]}; it must be [{width}]"
            )
    weights = [float(weight) for _, weight in segments]
    return _norm(x, scale, shift, lengths, weights, eps, dtype or x.dtype)


def regular_gelu(x: Tensor, transform: Matrix) -> Tensor:
    """T gelu(T^t x) along G, channel by channel, with the exact GELU.

    x [... D]; transform: the orthogonal T [G G] as nested tuples, so that kernels are compiled for
    it. The result has x's dtype. Raises ValueError where D is no multiple of G.
    """
    _channels(x, len(transform))
    return _gelu(x, [entry for row in transform for entry in row])


def _channels(x: Tensor, order: int) -> int:
    if x.shape[-1] % order:
        raise ValueError(f"{x.shape[-1]} channels are not a multiple of the group's order {order}")
    return x.shape[-1] // order


# The norm as an operator.

_NORM_ARGUMENTS = "Tensor? scale, Tensor? shift, int[] lengths, float[] weights, float eps"


@torch.library.custom_op(
    "octic::irrep_norm",
    mutates_args=(),
    schema=f"(Tensor x, {_NORM_ARGUMENTS}, ScalarType dtype) -> Tensor",
)
def _norm(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    lengths: Sequence[int],
    weights: Sequence[float],
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    arguments = (x.contiguous(), _dense(scale), _dense(shift), *_plan(lengths, weights), eps, dtype)
    return _run("triton_norm", "forward", plain_norm, *arguments)


@torch.library.custom_op(
    "octic::irrep_norm_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor x, {_NORM_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def _norm_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    lengths: Sequence[int],
    weights: Sequence[float],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dense = (x.contiguous(), grad.contiguous(), _dense(scale), _dense(shift))
    arguments = (*dense, *_plan(lengths, weights), eps)
    dx, dscale, dshift = _run("triton_norm", "backward", plain_norm_backward, *arguments)
    # An operator returns tensors, never None.
    dscale = x.new_empty(0) if scale is None else dscale.to(scale.dtype)
    dshift = x.new_empty(0) if shift is None else dshift.to(shift.dtype)
    return dx, dscale, dshift


@_norm.register_fake
def _(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=arguments[-1])


@_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, *_: Any) -> Any:
    empty = (
        x.new_empty(0) if part is None else part.new_empty(part.shape) for part in (scale, shift)
    )
    return x.new_empty(x.shape), *empty


def _norm_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.arguments = inputs[3:6]


def _norm_gradient(ctx: Any, grad: Tensor) -> tuple:
    x, scale, shift = ctx.saved_tensors
    dx, dscale, dshift = _norm_backward(grad, x, scale, shift, *ctx.arguments)
    dscale, dshift = None if scale is None else dscale, None if shift is None else dshift
    return dx, dscale, dshift, None, None, None, None


_norm.register_autograd(_norm_gradient, setup_context=_norm_context)


# The GELU as an operator; the matrix comes row by row.


@torch.library.custom_op(
    "octic::regular_gelu", mutates_args=(), schema="(Tensor x, float[] transform) -> Tensor"
)
def _gelu(x: Tensor, transform: Sequence[float]) -> Tensor:
    return _run("triton_gelu", "forward", plain_gelu, x.contiguous(), _matrix(tuple(transform)))


@torch.library.custom_op(
    "octic::regular_gelu_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, float[] transform) -> Tensor",
)
def _gelu_backward(grad: Tensor, x: Tensor, transform: Sequence[float]) -> Tensor:
    arguments = (x.contiguous(), grad.contiguous(), _matrix(tuple(transform)))
    return _run("triton_gelu", "backward", plain_gelu_backward, *arguments)


@_gelu.register_fake
def _(x: Tensor, transform: Sequence[float]) -> Tensor:
    return x.new_empty(x.shape)


@_gelu_backward.register_fake
def _(grad: Tensor, x: Tensor, transform: Sequence[float]) -> Tensor:
    return x.new_empty(x.shape)


def _gelu_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.transform = inputs[1]


def _gelu_gradient(ctx: Any, grad: Tensor) -> tuple:
    return _gelu_backward(grad, *ctx.saved_tensors, ctx.transform), None


_gelu.register_autograd(_gelu_gradient, setup_context=_gelu_context)


@register_flop_formula(
    [
        torch.ops.octic.irrep_norm,
        torch.ops.octic.irrep_norm_backward,
        torch.ops.octic.regular_gelu,
        torch.ops.octic.regular_gelu_backward,
    ]
)
def _no_multiply_adds(*shapes: Any, **_: Any) -> int:
    # Elementwise work, counted like torch's own layer norm and GELU: not at all.
    return 0


# Choice of the kernel.


def _run(module: str, function: str, plain: Callable, x: Tensor, *arguments: Any) -> Any:
    kernels = _triton_kernels() if x.is_cuda and x.dtype != torch.float64 else None
    if kernels is not None:
        with torch.cuda.device(x.device):
            return getattr(kernels[module], function)(x, *arguments)
    with torch.autocast(x.device.type, enabled=False):
        return plain(x, *arguments)


@lru_cache(maxsize=1)
def _triton_kernels() -> dict[str, ModuleType] | None:
    try:
        from octic import triton_gelu, triton_norm
    except ImportError:
        return None
    return {"triton_gelu": triton_gelu, "triton_norm": triton_norm}


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _plan(lengths: Sequence[int], weights: Sequence[float]) -> tuple[tuple, tuple]:
    return tuple(lengths), tuple(weights)


@lru_cache(maxsize=64)
def _matrix(entries: tuple[float, ...]) -> Matrix:
    order = math.isqrt(len(entries))
    return tuple(entries[row * order : (row + 1) * order] for row in range(order))


# The plain twins, written for few passes over memory.


def plain_norm(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    lengths: tuple[int, ...],
    weights: tuple[float, ...],
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Compute `irrep_norm` with PyTorch's operators, without autograd."""
    y, inverse = _normalised(x, lengths, weights, eps)
    y *= inverse
    if scale is not None:
        y *= scale
    if shift is not None:
        y[:, : len(shift)] += shift
    return y.view(x.shape).to(dtype)


def plain_norm_backward(
    x: Tensor,
    grad: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    lengths: tuple[int, ...],
    weights: tuple[float, ...],
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x (its dtype), scale and shift."""
    hat, inverse = _normalised(x, lengths, weights, eps)
    hat *= inverse
    grad = grad.reshape(hat.shape).to(hat.dtype)
    product = grad * hat
    dshift = None if shift is None else grad[:, : len(shift)].sum(0)
    if scale is None:
        dscale, along = None, product.sum(-1)
        dx = grad.clone()
    else:
        scale = scale.to(hat.dtype)
        dscale, along = product.sum(0), product @ scale
        dx = torch.mul(grad, scale, out=product)
    along = along[:, None, None] / sum(lengths)
    runs = zip(_runs(dx, lengths, weights), _runs(hat, lengths, weights), strict=True)
    for (part, factor), (normal, _) in runs:
        part -= part.mean(-1, keepdim=True)
        part.addcmul_(normal, along, value=-factor)
    dx *= inverse
    return dx.view(x.shape).to(x.dtype), dscale, dshift


def _normalised(
    x: Tensor, lengths: tuple[int, ...], weights: tuple[float, ...], eps: float
) -> tuple[Tensor, Tensor]:
    """x without the means of its segments [N D], and 1 / deviation [N 1]."""
    x = _statistics_dtype(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
    centred = torch.empty_like(x)
    variance = x.new_full((len(x),), eps)
    runs = zip(_runs(x, lengths, weights), _runs(centred, lengths, weights), strict=True)
    for (part, factor), (out, _) in runs:
        torch.sub(part, part.mean(-1, keepdim=True), out=out)
        # torch.var_mean reads x once, but takes 60 times as long as a mean on a CPU.
        length = torch.linalg.vector_norm(out.flatten(1), dim=-1)
        variance.addcmul_(length, length, value=factor)
    return centred, variance.div_(sum(lengths)).rsqrt_().unsqueeze(-1)


def _runs(
    x: Tensor, lengths: tuple[int, ...], weights: tuple[float, ...]
) -> Iterator[tuple[Tensor, float]]:
    """Runs of equal segments of x [N D]: views [N count length*C], weight of a squared channel."""
    channels, start = x.shape[-1] // sum(lengths), 0
    for (length, weight), equal in groupby(zip(lengths, weights, strict=True)):
        count, width = len(list(equal)), length * channels
        yield x[:, start : start + count * width].unflatten(1, (count, width)), weight / width
        start += count * width


def plain_gelu(x: Tensor, transform: Matrix) -> Tensor:
    """Compute `regular_gelu` with PyTorch's operators, without autograd."""
    hidden, back = _hidden(x, transform)
    return torch.bmm(back, F.gelu(hidden)).view(x.shape).to(x.dtype)


def plain_gelu_backward(x: Tensor, grad: Tensor, transform: Matrix) -> Tensor:
    """Gradient of x."""
    hidden, back = _hidden(x, transform)
    grad, _ = _hidden(grad, transform)
    return torch.bmm(back, torch.ops.aten.gelu_backward(grad, hidden)).view(x.shape).to(x.dtype)


def _hidden(x: Tensor, transform: Matrix) -> tuple[Tensor, Tensor]:
    """Regular components [N G C] of x, and the matrices [N G G] that take them back."""
    order = len(transform)
    x = _statistics_dtype(x.reshape(math.prod(x.shape[:-1]), order, x.shape[-1] // order))
    back = _matrix_tensor(transform, x.dtype, x.device).expand(len(x), order, order)
    return torch.bmm(back.mT, x), back


@lru_cache(maxsize=64)
def _matrix_tensor(matrix: Matrix, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(matrix, dtype=dtype, device=device)


def _statistics_dtype(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
