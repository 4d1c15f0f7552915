"""The matrices of an equivariant linear layer as its product takes them, from a weight an irrep.

Stacked, scaled and cast: some thirty short operators a block, forward and backward, which a GPU
finishes sooner than it starts them. On CUDA each layer's are one operator (namespace `octic`) and
one Triton kernel either way (`triton_matrices`); elsewhere torch's own do it.

Letters: L one-dimensional irreps, their matrices [C' C]; the two-dimensional one's [Q' Q].
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from octic.operators import multiplies_nothing, operator, takes_triton

Matrices = tuple[Tensor, Tensor | None, Tensor | None]


def stack_matrices(
    weights: Sequence[Tensor],
    bias: Tensor | None,
    factors: Sequence[Tensor],
    *,
    lines: int,
    dtype: torch.dtype | None = None,
) -> Matrices:
    """Matrices [L C' C], [Q' Q] (or None) and the bias [C'] (or None), in `dtype` if it is given.

    weights: those of the L = `lines` one-dimensional irreps, then of the two-dimensional one, if
    there is one. factors: for each of them what its rows are multiplied by, or none at all; the
    bias goes with the first.
    """
    if not takes_triton(weights[0]) or lines > 4:
        return plain_stack(weights, bias, factors, lines, dtype)
    dtype = dtype or weights[0].dtype
    if torch.is_grad_enabled():
        found = _Stack.apply(lines, len(weights), dtype, bias, *weights, *factors)
    else:
        found = _stack(weights, bias, factors, lines, dtype)
    plane = found[1] if len(weights) > lines else None
    return found[0], plane, None if bias is None else found[2]


def plain_stack(
    weights: Sequence[Tensor],
    bias: Tensor | None,
    factors: Sequence[Tensor],
    lines: int,
    dtype: torch.dtype | None,
) -> Matrices:
    """Compute `stack_matrices` with PyTorch's operators."""
    stacked = torch.stack(list(weights[:lines]))
    plane = weights[lines] if len(weights) > lines else None
    if factors:
        stacked = stacked * torch.stack(list(factors[:lines])).unsqueeze(-1)
        bias = None if bias is None else bias * factors[0]
        plane = None if plane is None else plane * factors[lines].unsqueeze(-1)
    if dtype is None:
        return stacked, plane, bias
    plane, bias = (None if part is None else part.to(dtype) for part in (plane, bias))
    return stacked.to(dtype), plane, bias


@operator(
    "stack_matrices(Tensor[] weights, Tensor? bias, Tensor[] factors, int lines, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)"
)
def _stack(
    weights: Sequence[Tensor],
    bias: Tensor | None,
    factors: Sequence[Tensor],
    lines: int,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    if not takes_triton(weights[0]):
        found = plain_stack(weights, bias, factors, lines, dtype)
        return tuple(weights[0].new_empty(0, dtype=dtype) if t is None else t for t in found)
    from octic import triton_matrices

    with torch.cuda.device_of(weights[0]):
        dense = [w.contiguous() for w in weights]
        return triton_matrices.stack(dense, bias, factors, lines, dtype)


@operator(
    "stack_matrices_backward(Tensor d_lines, Tensor d_plane, Tensor d_bias, Tensor[] weights,"
    " Tensor? bias, Tensor[] factors, int lines) -> Tensor[]"
)
def _stack_backward(
    d_lines: Tensor,
    d_plane: Tensor,
    d_bias: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    factors: Sequence[Tensor],
    lines: int,
) -> list[Tensor]:
    if not takes_triton(d_lines):
        return plain_unstack(d_lines, d_plane, d_bias, weights, bias, factors, lines)
    from octic import triton_matrices

    with torch.cuda.device_of(d_lines):
        grads = (d_lines.contiguous(), d_plane.contiguous(), d_bias.contiguous())
        dense = [w.contiguous() for w in weights]
        return triton_matrices.unstack(*grads, dense, bias, factors, lines)


def plain_unstack(
    d_lines: Tensor,
    d_plane: Tensor,
    d_bias: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    factors: Sequence[Tensor],
    lines: int,
) -> list[Tensor]:
    """Gradients of weights, factors and bias with PyTorch's operators."""
    grads = [*d_lines.unbind(), d_plane][: len(weights)]
    if not factors:
        found = [g.to(w.dtype, copy=True) for g, w in zip(grads, weights, strict=True)]
        return found if bias is None else [*found, d_bias.to(bias.dtype, copy=True)]
    scaled = zip(grads, factors, weights, strict=True)
    d_weights = [(g * f.unsqueeze(-1)).to(w.dtype) for g, f, w in scaled]
    sums = [(g * w).sum(-1) for g, w in zip(grads, weights, strict=True)]
    if bias is not None:
        sums[0] = sums[0] + d_bias * bias
    d_factors = [total.to(f.dtype) for total, f in zip(sums, factors, strict=True)]
    rest = [] if bias is None else [(d_bias * factors[0]).to(bias.dtype)]
    return [*d_weights, *d_factors, *rest]


@torch.library.register_fake("octic::stack_matrices")
def _(
    weights: Sequence[Tensor],
    bias: Tensor | None,
    factors: Sequence[Tensor],
    lines: int,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    first = weights[0]
    plane = weights[lines].shape if len(weights) > lines else (0,)
    shapes = (lines, *first.shape), plane, (0,) if bias is None else bias.shape
    return tuple(first.new_empty(shape, dtype=dtype) for shape in shapes)


@torch.library.register_fake("octic::stack_matrices_backward")
def _(
    d_lines: Tensor,
    d_plane: Tensor,
    d_bias: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    factors: Sequence[Tensor],
    lines: int,
) -> list[Tensor]:
    parts = [*weights, *factors, *([] if bias is None else [bias])]
    return [part.new_empty(part.shape) for part in parts]


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        lines: int,
        count: int,
        dtype: torch.dtype,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(bias, *tensors)
        ctx.lines, ctx.count = lines, count
        return _stack(tensors[:count], bias, tensors[count:], lines, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        bias, *tensors = ctx.saved_tensors
        weights, factors = tensors[: ctx.count], tensors[ctx.count :]
        found = _stack_backward(*grads, weights, bias, factors, ctx.lines)
        d_bias = None if bias is None else found[-1]
        return None, None, None, d_bias, *found[: len(tensors)]


multiplies_nothing(torch.ops.octic.stack_matrices, torch.ops.octic.stack_matrices_backward)
