"""The norm over irreps, alone or after a sum, and the GELU on the regular basis: an operator each.

They stand between the matrix products of an octic block. Each is an operator of torch (namespace
`octic`) forward and one backward, which an autograd.Function ties together. On CUDA a Triton kernel
computes it (`triton_norm`, `triton_gelu`); elsewhere, and in float64, a plain twin does
(`plain_kernels`). Both compute in float32 (float64 for float64) and round once. `torch.compile`
keeps the operators whole, autocast leaves them alone, and FLOP counters count no multiply-adds for
them.

Letters: N tokens, D = G C channels, G the order of the group, C channels per copy; a feature
[... D] is seen as [... G C].
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from octic.operators import multiplies_nothing, operator, takes_triton
from octic.plain_kernels import (
    Matrix,
    plain_gelu,
    plain_gelu_backward,
    plain_residual_norm,
    plain_residual_norm_backward,
)
from octic.precision import autocast_dtype

Segments = tuple[tuple[int, float], ...]


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
    lengths, weights = _checked_segments(x, scale, shift, segments)
    compute = _Norm.apply if torch.is_grad_enabled() else _norm
    return compute(x, scale, shift, lengths, weights, eps, dtype or x.dtype)


def residual_norm(
    x: Tensor,
    branch: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    segments: Segments,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x + branch and the `irrep_norm` of this sum, in one pass over memory, forward and backward.

    The sum has the wider of both dtypes; the rest is as in `irrep_norm`. Raises ValueError where
    shapes do not fit.
    """
    if branch.shape != x.shape:
        raise ValueError(f"a branch of shape {[*branch.shape]} beside x of {[*x.shape]}")
    lengths, weights = _checked_segments(x, scale, shift, segments)
    compute = _ResidualNorm.apply if torch.is_grad_enabled() else _residual_norm
    return compute(x, branch, scale, shift, lengths, weights, eps, dtype or x.dtype)


def regular_gelu(x: Tensor, transform: Matrix) -> Tensor:
    """T gelu(T^t x) along G, channel by channel, with the exact GELU.

    x [... D]; transform: the orthogonal T [G G] as nested tuples, so that kernels are compiled for
    it. The result has x's dtype. Raises ValueError where D is no multiple of G.
    """
    _channels(x, len(transform))
    compute = _GELU.apply if torch.is_grad_enabled() else _gelu
    return compute(x, [entry for row in transform for entry in row])


def _checked_segments(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, segments: Segments
) -> tuple[list[int], list[float]]:
    lengths = [length for length, _ in segments]
    channels = _channels(x, sum(lengths))
    for name, tensor, width in (("scale", scale, x.shape[-1]), ("shift", shift, channels)):
        if tensor is not None and tensor.shape != (width,):
            raise ValueError(
                f"irrep_norm: {name} has shape {[*tensor.shape]}; it must be [{width}]"
            )
    return lengths, [float(weight) for _, weight in segments]


def _channels(x: Tensor, order: int) -> int:
    if x.shape[-1] % order:
        raise ValueError(f"{x.shape[-1]} channels are not a multiple of the group's order {order}")
    return x.shape[-1] // order


# The norm as an operator.

_NORM_ARGUMENTS = "Tensor? scale, Tensor? shift, int[] lengths, float[] weights, float eps"


@operator(f"irrep_norm(Tensor x, {_NORM_ARGUMENTS}, ScalarType dtype) -> Tensor")
def _norm(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    lengths: Sequence[int],
    weights: Sequence[float],
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    parts = (x.contiguous(), None, _dense(scale), _dense(shift))
    return _run_norm("forward", *parts, *_plan(lengths, weights), eps, dtype)[1]


@operator(
    f"irrep_norm_backward(Tensor grad, Tensor x, {_NORM_ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
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
    parts = (x.contiguous(), grad.contiguous(), None, None, _dense(scale), _dense(shift))
    dx, _, *sums = _run_norm("backward", *parts, *_plan(lengths, weights), eps)
    return dx, *_like_parameters(x, sums, (scale, shift))


@operator(
    f"residual_norm(Tensor x, Tensor branch, {_NORM_ARGUMENTS}, ScalarType dtype)"
    " -> (Tensor, Tensor)"
)
def _residual_norm(
    x: Tensor,
    branch: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    lengths: Sequence[int],
    weights: Sequence[float],
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    parts = (x.contiguous(), branch.contiguous(), _dense(scale), _dense(shift))
    return _run_norm("forward", *parts, *_plan(lengths, weights), eps, dtype)


@operator(
    f"residual_norm_backward(Tensor grad, Tensor? past, Tensor total, {_NORM_ARGUMENTS},"
    " ScalarType branch_dtype) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _residual_norm_backward(
    grad: Tensor,
    past: Tensor | None,
    total: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    lengths: Sequence[int],
    weights: Sequence[float],
    eps: float,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cast = None if branch_dtype == total.dtype else branch_dtype
    parts = (total, grad.contiguous(), _dense(past), cast, _dense(scale), _dense(shift))
    dx, dbranch, *sums = _run_norm("backward", *parts, *_plan(lengths, weights), eps)
    dbranch = total.new_empty(0) if dbranch is None else dbranch
    return dx, dbranch, *_like_parameters(total, sums, (scale, shift))


def _like_parameters(
    x: Tensor, sums: Sequence[Tensor | None], parameters: Sequence
) -> list[Tensor]:
    # An operator returns tensors, never None.
    return [
        x.new_empty(0) if total is None else total.to(parameter.dtype)
        for total, parameter in zip(sums, parameters, strict=True)
    ]


@torch.library.register_fake("octic::irrep_norm")
def _(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=arguments[-1])


@torch.library.register_fake("octic::irrep_norm_backward")
def _(grad: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, *_: Any) -> Any:
    return x.new_empty(x.shape), *_empty_like(x, scale, shift)


@torch.library.register_fake("octic::residual_norm")
def _(x: Tensor, branch: Tensor, *arguments: Any) -> Any:
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype))
    return total, x.new_empty(x.shape, dtype=arguments[-1])


@torch.library.register_fake("octic::residual_norm_backward")
def _(
    grad: Tensor,
    past: Tensor | None,
    total: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *arguments: Any,
) -> Any:
    dtype = arguments[-1]
    dbranch = total.new_empty(0 if dtype == total.dtype else total.shape, dtype=dtype)
    return total.new_empty(total.shape), dbranch, *_empty_like(total, scale, shift)


def _empty_like(x: Tensor, *parts: Tensor | None) -> list[Tensor]:
    return [x.new_empty(0) if part is None else part.new_empty(part.shape) for part in parts]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        ctx.save_for_backward(*inputs[:3])
        ctx.arguments = inputs[3:6]
        return _norm(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, scale, shift = ctx.saved_tensors
        dx, dscale, dshift = _norm_backward(grad, x, scale, shift, *ctx.arguments)
        dscale, dshift = None if scale is None else dscale, None if shift is None else dshift
        return dx, dscale, dshift, None, None, None, None


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        total, y = _residual_norm(*inputs)
        ctx.save_for_backward(total, *inputs[2:4])
        ctx.arguments, ctx.branch_dtype = inputs[4:7], inputs[1].dtype
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, past: Tensor | None, grad: Tensor | None) -> tuple:
        total, scale, shift = ctx.saved_tensors
        if grad is None:
            dx, dbranch, dscale, dshift = past, past, None, None
        else:
            arguments = (total, scale, shift, *ctx.arguments, ctx.branch_dtype)
            dx, dbranch, dscale, dshift = _residual_norm_backward(grad, past, *arguments)
            dbranch = dbranch if dbranch.numel() == dx.numel() else dx
            dscale, dshift = None if scale is None else dscale, None if shift is None else dshift
        return dx, dbranch, dscale, dshift, None, None, None, None


# The GELU as an operator; the matrix comes row by row.


@operator("regular_gelu(Tensor x, float[] transform) -> Tensor")
def _gelu(x: Tensor, transform: Sequence[float]) -> Tensor:
    return _run("triton_gelu", "forward", plain_gelu, x.contiguous(), _matrix(tuple(transform)))


@operator("regular_gelu_backward(Tensor grad, Tensor x, float[] transform) -> Tensor")
def _gelu_backward(grad: Tensor, x: Tensor, transform: Sequence[float]) -> Tensor:
    arguments = (x.contiguous(), grad.contiguous(), _matrix(tuple(transform)))
    return _run("triton_gelu", "backward", plain_gelu_backward, *arguments)


@torch.library.register_fake("octic::regular_gelu")
def _(x: Tensor, transform: Sequence[float]) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("octic::regular_gelu_backward")
def _(grad: Tensor, x: Tensor, transform: Sequence[float]) -> Tensor:
    return x.new_empty(x.shape)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, transform: Sequence[float]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.transform = transform
        return _gelu(x, transform)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _gelu_backward(grad, *ctx.saved_tensors, ctx.transform), None


multiplies_nothing(
    torch.ops.octic.irrep_norm,
    torch.ops.octic.irrep_norm_backward,
    torch.ops.octic.residual_norm,
    torch.ops.octic.residual_norm_backward,
    torch.ops.octic.regular_gelu,
    torch.ops.octic.regular_gelu_backward,
)


# Choice of the kernel.


def _run_norm(function: str, *arguments: Any) -> Any:
    plain = plain_residual_norm if function == "forward" else plain_residual_norm_backward
    return _run("triton_norm", function, plain, *arguments)


def _run(module: str, function: str, plain: Callable, x: Tensor, *arguments: Any) -> Any:
    if takes_triton(x):
        from octic import triton_gelu, triton_norm

        kernels = {"triton_gelu": triton_gelu, "triton_norm": triton_norm}[module]
        with torch.cuda.device_of(x):
            return getattr(kernels, function)(x, *arguments)
    if autocast_dtype(x) is None:
        return plain(x, *arguments)
    with torch.autocast(x.device.type, enabled=False):
        return plain(x, *arguments)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _plan(lengths: Sequence[int], weights: Sequence[float]) -> tuple[tuple, tuple]:
    return tuple(lengths), tuple(weights)


@lru_cache(maxsize=64)
def _matrix(entries: tuple[float, ...]) -> Matrix:
    order = math.isqrt(len(entries))
    return tuple(entries[row * order : (row + 1) * order] for row in range(order))
