"""The norm over irreps, alone or after a sum: an operator of torch (namespace `octic`).

It is one operator forward and one backward, which an autograd.Function ties together. On CUDA a
Triton kernel computes it (`triton_norm`); elsewhere, and in float64, a plain twin does
(`plain_kernels`). Both compute in float32 (float64 for float64) and round once. `torch.compile`
keeps the operators whole, autocast leaves them alone, and FLOP counters count no multiply-adds for
them.

Letters: N tokens, D = G C channels, G the order of the group, C channels per copy; a feature
[... D] is seen as [... G C].
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from octic import composed
from octic.device import runs_triton
from octic.operators import channels_of_copies, dense, launch, multiplies_nothing, operator
from octic.plain_kernels import plain_residual_norm, plain_residual_norm_backward, plain_sum
from octic.precision import without_autocast

Segments = tuple[tuple[int, float], ...]


def irrep_norm(
    x: Tensor,
    scales: Sequence[Tensor] = (),
    shift: Tensor | None = None,
    *,
    segments: Segments,
    rows: Sequence[int] | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Subtract each segment's mean, divide by the common deviation, then scale and shift.

    x [... D]. Segments are consecutive channels, each (length in units of C, weight w):
    deviation^2 = (sum of w * var + eps) / G with biased variances. scales: factors [length * C],
    none at all or one tensor for so many consecutive segments as `rows` says (None: one each);
    shift [C], added to the first C channels. The result has x's dtype, or `dtype`, under autocast
    too and whatever the dtypes of scales and shift. Raises ValueError where shapes do not fit.
    Formula: octic-vits, LayerNormD8.
    """
    plan = _checked_plan(x, scales, shift, segments, rows)
    dtype = dtype or x.dtype
    if composed.is_composed():
        return composed.norm(x, scales, shift, *plan, eps, dtype)
    if torch.is_grad_enabled():
        return _Norm.apply(x, None, None, None, shift, *plan, eps, dtype, *scales)[-1]
    return _norm(x, None, None, None, scales, shift, *plan, eps, dtype)[-1]


def residual_norm(
    x: Tensor,
    branch: Tensor,
    scales: Sequence[Tensor] = (),
    shift: Tensor | None = None,
    *,
    segments: Segments,
    rows: Sequence[int] | None = None,
    bias: Tensor | None = None,
    factors: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x + factors (branch + bias) and the `irrep_norm` of this sum, in one pass over memory.

    The sum has the wider of both dtypes. bias [C]: added to the branch's first C channels; it gets
    no gradient (see `octic.irrep_linear`). factors: what drop path multiplies by, broadcast to
    [... 1]; they get none either, and are 1 where not given. The rest is as in `irrep_norm`. Raises
    ValueError where shapes do not fit.
    """
    if branch.shape != x.shape:
        raise ValueError(f"a branch of shape {[*branch.shape]} beside x of {[*x.shape]}")
    plan = _checked_plan(x, scales, shift, segments, rows)
    if bias is not None:
        _check_width("bias", bias, x.shape[-1] // sum(plan[0]))
    if factors is not None:
        factors = factors.expand(*x.shape[:-1], 1)
    dtype = dtype or x.dtype
    if composed.is_composed():
        total = plain_sum(x, branch, bias, factors)
        return total, composed.norm(total, scales, shift, *plan, eps, dtype)
    if torch.is_grad_enabled():
        return _Norm.apply(x, branch, bias, factors, shift, *plan, eps, dtype, *scales)
    return _norm(x, branch, bias, factors, scales, shift, *plan, eps, dtype)


def _checked_plan(
    x: Tensor,
    scales: Sequence[Tensor],
    shift: Tensor | None,
    segments: Segments,
    rows: Sequence[int] | None,
) -> tuple[list[int], list[float], list[int]]:
    """Lengths and weights of the segments, and how many of them share each scale."""
    lengths = [length for length, _ in segments]
    channels = channels_of_copies(x, sum(lengths))
    shared = [1] * len(scales) if rows is None else list(rows)
    if scales and (len(scales) != len(shared) or sum(shared) != len(lengths)):
        raise ValueError(
            f"irrep_norm: {len(scales)} scales with rows {shared} for {len(lengths)} segments"
        )
    first = 0
    for number, (scale, count) in enumerate(zip(scales, shared, strict=False)):
        if count != 1 and len({*lengths[first : first + count]}) != 1:
            raise ValueError(
                f"irrep_norm: scale {number} is for segments of lengths "
                f"{lengths[first : first + count]}; it must be for one or more of one length"
            )
        _check_width(f"scale {number}", scale, lengths[first] * channels)
        first += count
    if shift is not None:
        _check_width("shift", shift, channels)
    return lengths, [float(weight) for _, weight in segments], shared


def _check_width(name: str, tensor: Tensor, width: int) -> None:
    if tensor.shape != (width,):
        raise ValueError(f"irrep_norm: {name} has shape {[*tensor.shape]}; it must be [{width}]")


# The norm as an operator. Without a branch nothing is added, and the sum it returns is empty: an
# operator returns tensors, never None or one of its arguments.

_NORM_ARGUMENTS = (
    "Tensor[] scales, Tensor? shift, int[] lengths, float[] weights, int[] shared, float eps"
)


@operator(
    f"irrep_norm(Tensor x, Tensor? branch, Tensor? bias, Tensor? factors, {_NORM_ARGUMENTS},"
    " ScalarType dtype) -> (Tensor, Tensor)"
)
def _norm(
    x: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    factors: Tensor | None,
    scales: Sequence[Tensor],
    shift: Tensor | None,
    lengths: Sequence[int],
    weights: Sequence[float],
    shared: Sequence[int],
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    summed = (x.contiguous(), dense(branch), dense(bias), dense(factors))
    affine = (_all_dense(scales), dense(shift))
    total, y = _run("forward", *summed, *affine, *_plan(lengths, weights, shared), eps, dtype)
    return x.new_empty(0) if branch is None else total, y


@operator(
    f"irrep_norm_backward(Tensor grad, Tensor? past, Tensor x, Tensor? factors, {_NORM_ARGUMENTS},"
    " ScalarType? branch_dtype) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _norm_backward(
    grad: Tensor,
    past: Tensor | None,
    x: Tensor,
    factors: Tensor | None,
    scales: Sequence[Tensor],
    shift: Tensor | None,
    lengths: Sequence[int],
    weights: Sequence[float],
    shared: Sequence[int],
    eps: float,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x [... D], of a branch of `branch_dtype`, of all scales [D] and the shift [C].

    What is not asked for or not there is empty. x is what was normalised, `past` the gradient that
    it has from elsewhere.
    """
    tensors = (x.contiguous(), grad.contiguous(), dense(past), dense(factors))
    plan = (_all_dense(scales), dense(shift), *_plan(lengths, weights, shared))
    found = _run("backward", *tensors, branch_dtype, *plan, eps)
    dx, dbranch, dscales, dshift = (x.new_empty(0) if t is None else t for t in found)
    dscales = dscales.to(scales[0].dtype) if scales else dscales
    return dx, dbranch, dscales, dshift if shift is None else dshift.to(shift.dtype)


@torch.library.register_fake("octic::irrep_norm")
def _(x: Tensor, branch: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=arguments[-1])
    if branch is None:
        return x.new_empty(0), y
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype)), y


@torch.library.register_fake("octic::irrep_norm_backward")
def _(
    grad: Tensor,
    past: Tensor | None,
    x: Tensor,
    factors: Tensor | None,
    scales: Sequence[Tensor],
    shift: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = arguments[-1]
    dbranch = x.new_empty(0) if dtype is None else x.new_empty(x.shape, dtype=dtype)
    dscales = scales[0].new_empty(x.shape[-1]) if scales else x.new_empty(0)
    dshift = x.new_empty(0) if shift is None else shift.new_empty(shift.shape)
    return x.new_empty(x.shape), dbranch, dscales, dshift


class _Norm(torch.autograd.Function):
    """The sum, where there is a branch, and its norm."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        bias: Tensor | None,
        factors: Tensor | None,
        shift: Tensor | None,
        lengths: list[int],
        weights: list[float],
        shared: list[int],
        eps: float,
        dtype: torch.dtype,
        *scales: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.arguments = (lengths, weights, shared, eps)
        total, y = _norm(x, branch, bias, factors, scales, shift, *ctx.arguments, dtype)
        ctx.branch_dtype = None if branch is None else branch.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if branch is None else total, factors, shift, *scales)
        return (y,) if branch is None else (total, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        x, factors, shift, *scales = ctx.saved_tensors
        summed, grad = ctx.branch_dtype is not None, grads[-1]
        past = grads[0] if summed else None
        if grad is None:
            dbranch = _of_branch(past, factors, ctx.branch_dtype)
            return past, dbranch, *[None] * (8 + len(scales))
        if composed.is_differentiated_again():
            dx, dshift, *dscales = _gradients_again(ctx, x, shift, scales, grad)
            dx = dx if past is None else dx + past
            dbranch = _of_branch(dx, factors, ctx.branch_dtype)
            return dx, dbranch, None, None, dshift, *[None] * 5, *dscales
        same = factors is None and ctx.branch_dtype in (x.dtype, None)
        arguments = (x, factors, scales, shift, *ctx.arguments, None if same else ctx.branch_dtype)
        dx, dbranch, dscales, dshift = _norm_backward(grad, past, *arguments)
        if same:
            dbranch = dx if summed else None
        dshift = None if shift is None else dshift
        dscales = _by_scale(dscales, scales, ctx.arguments[2])
        return dx, dbranch, None, None, dshift, *[None] * 5, *dscales


def _of_branch(
    dx: Tensor | None, factors: Tensor | None, dtype: torch.dtype | None
) -> Tensor | None:
    """Gradient of a branch of `dtype`, from that of the sum; None without a branch."""
    if dx is None or dtype is None:
        return None
    return (dx if factors is None else dx * factors).to(dtype)


def _gradients_again(
    ctx: Any, x: Tensor, shift: Tensor | None, scales: Sequence[Tensor], grad: Tensor
) -> list[Any]:
    """Gradients of x, shift and scales of a norm, differentiable themselves."""

    lengths, weights, shared, eps = ctx.arguments

    def norm(x: Tensor, shift: Tensor | None, *scales: Tensor) -> Tensor:
        return composed.norm(x, scales, shift, lengths, weights, shared, eps, grad.dtype)

    inputs = [x, shift, *scales]
    wanted = [part is not None and part.requires_grad for part in inputs]
    return composed.gradients(norm, inputs, wanted, grad)


def _by_scale(dscales: Tensor, scales: Sequence[Tensor], shared: Sequence[int]) -> list[Tensor]:
    """Gradients of the scales, from those [D] by segment."""
    found, start = [], 0
    for scale, count in zip(scales, shared, strict=False):
        part = dscales[start : start + count * len(scale)]
        found.append(part.view(count, -1).sum(0) if count > 1 else part)
        start += len(part)
    return found


multiplies_nothing(torch.ops.octic.irrep_norm, torch.ops.octic.irrep_norm_backward)


# Choice of the kernel.


def _run(function: str, x: Tensor, *arguments: Any) -> Any:
    if runs_triton(x):
        return launch(f"triton_norm.{function}", x, x, *arguments)
    forward = function == "forward"
    plain: Callable = plain_residual_norm if forward else plain_residual_norm_backward
    return without_autocast(plain, x, *arguments)


def _all_dense(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def _plan(*lists: Sequence[float]) -> tuple[tuple, ...]:
    return tuple(map(tuple, lists))
