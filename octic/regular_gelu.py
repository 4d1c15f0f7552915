"""The GELU on the regular basis: an operator of torch (namespace `octic`), forward and backward.

Made as the norms are (`octic.irrep_norm`, its letters too): a Triton kernel on CUDA
(`triton_gelu`), a plain twin elsewhere and in float64 (`plain_kernels`).
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from octic import composed
from octic.device import runs_triton
from octic.operators import channels_of_copies, dense, launch, multiplies_nothing, operator
from octic.plain_kernels import Matrix, plain_gelu, plain_gelu_backward
from octic.precision import without_autocast


def regular_gelu(x: Tensor, transform: Matrix, bias: Tensor | None = None) -> Tensor:
    """T gelu(T^t x) along G, channel by channel, with the exact GELU.

    x [... D]; transform: the orthogonal T [G G] as nested tuples, so that kernels are compiled for
    it. bias [C]: added to the first C channels of x before; it gets no gradient (see
    `octic.irrep_linear`). The result has x's dtype. Raises ValueError where shapes do not fit.
    """
    channels = channels_of_copies(x, len(transform))
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"regular_gelu: bias has shape {[*bias.shape]}; it must be [{channels}]")
    if composed.is_composed():
        return composed.gelu(x, bias, transform)
    compute = _GELU.apply if torch.is_grad_enabled() else _gelu
    return compute(x, bias, [entry for row in transform for entry in row])


@operator("regular_gelu(Tensor x, Tensor? bias, float[] transform) -> Tensor")
def _gelu(x: Tensor, bias: Tensor | None, transform: Sequence[float]) -> Tensor:
    arguments = (dense(bias), _matrix(tuple(transform)))
    return _run("forward", plain_gelu, x.contiguous(), *arguments)


@operator("regular_gelu_backward(Tensor grad, Tensor x, Tensor? bias, float[] transform) -> Tensor")
def _gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, transform: Sequence[float]
) -> Tensor:
    arguments = (dense(bias), grad.contiguous(), _matrix(tuple(transform)))
    return _run("backward", plain_gelu_backward, x.contiguous(), *arguments)


@torch.library.register_fake("octic::regular_gelu")
def _(x: Tensor, bias: Tensor | None, transform: Sequence[float]) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("octic::regular_gelu_backward")
def _(grad: Tensor, x: Tensor, bias: Tensor | None, transform: Sequence[float]) -> Tensor:
    return x.new_empty(x.shape)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, transform: Sequence[float]) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.transform = transform
        return _gelu(x, bias, transform)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        if composed.is_differentiated_again():
            x, bias = ctx.saved_tensors
            again = partial(composed.gelu, bias=bias, transform=_matrix(tuple(ctx.transform)))
            return *composed.gradients(again, [x], [True], grad), None, None
        return _gelu_backward(grad, *ctx.saved_tensors, ctx.transform), None, None


multiplies_nothing(torch.ops.octic.regular_gelu, torch.ops.octic.regular_gelu_backward)


def _run(function: str, plain: Callable, x: Tensor, *arguments: Any) -> Tensor:
    if runs_triton(x):
        return launch(f"triton_gelu.{function}", x, x, *arguments)
    return without_autocast(plain, x, *arguments)


@lru_cache(maxsize=64)
def _matrix(entries: tuple[float, ...]) -> Matrix:
    order = math.isqrt(len(entries))
    return tuple(entries[row * order : (row + 1) * order] for row in range(order))
