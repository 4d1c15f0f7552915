"""PyTorch twins of the Triton kernels, for any device and dtype, with few passes over memory.

Forward and backward are written out without autograd; the callers (`octic.irrep_norm` and the like)
connect them. The Triton kernels are tested against these. Letters as in `octic.irrep_norm`.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Matrix = tuple[tuple[float, ...], ...]
PIECE = 2**19  # values of a piece: with its intermediates it about fills a core's own cache


def plain_norm(
    x: Tensor,
    scales: Sequence[Tensor],
    shift: Tensor | None,
    lengths: tuple[int, ...],
    weights: tuple[float, ...],
    shared: tuple[int, ...],
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Compute `irrep_norm` with PyTorch's operators, without autograd."""
    centred, inverse_factors = _centred(x, lengths, weights)
    weight, bias = _affine(scales, shared, shift, inverse_factors)
    width = centred.shape[-1]
    y = torch.native_layer_norm(centred, [width], weight, bias, eps / sum(lengths))[0]
    return y.view(x.shape).to(dtype)


def plain_norm_backward(
    x: Tensor,
    grad: Tensor,
    scales: Sequence[Tensor],
    shift: Tensor | None,
    lengths: tuple[int, ...],
    weights: tuple[float, ...],
    shared: tuple[int, ...],
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x (its dtype), of the scales by segment [D] and of the shift."""
    centred, inverse_factors = _centred(x, lengths, weights)
    weight, bias = _affine(scales, shared, shift, inverse_factors)
    width = centred.shape[-1]
    length = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    inverse = length.square_().div_(width).add_(eps / sum(lengths)).rsqrt_()
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad.reshape(centred.shape).to(centred.dtype),
        centred,
        [width],
        torch.zeros_like(inverse),
        inverse,
        weight,
        bias,
        [True, bool(scales), shift is not None],
    )
    # Centring is its own transpose.
    dx = _centred(dx, lengths, weights)[0]
    dscales = dweight * inverse_factors if scales else None
    dshift = None if shift is None else dbias[: shift.shape[0]]
    return dx.view(x.shape).to(x.dtype), dscales, dshift


def plain_residual_norm(
    x: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    factors: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """x + branch (without one x itself) and its `plain_norm`, whose other arguments follow.

    bias: added to as many of the branch's first channels as it has; factors [... 1]: multiply both.
    """
    total = x if branch is None else plain_sum(x, branch, bias, factors)
    return total, plain_norm(total, *arguments)


def plain_sum(x: Tensor, branch: Tensor, bias: Tensor | None, factors: Tensor | None) -> Tensor:
    """x + factors (branch + bias), letters as above; without factors they are 1."""
    branch = with_bias(branch, bias)
    return x + (branch if factors is None else branch * factors)


def plain_residual_norm_backward(
    total: Tensor,
    grad: Tensor,
    past: Tensor | None,
    factors: Tensor | None,
    branch_dtype: torch.dtype | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, of the branch (in its dtype), scales by segment [D] and shift.

    past: the gradient that the sum has from elsewhere, or None.
    """
    dx, dscales, dshift = plain_norm_backward(total, grad, *arguments)
    if past is not None:
        dx = dx + past
    of_branch = dx if factors is None else dx * factors
    dbranch = None if branch_dtype is None else of_branch.to(branch_dtype)
    return dx, dbranch, dscales, dshift


def _centred(
    x: Tensor, lengths: tuple[int, ...], weights: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """x without the means of its segments, times factors [D], and the inverse of these: [N D], [D].

    Factors are such that the mean square of a row is the variance which the norm divides by. As
    every segment has mean 0, so has the row, and PyTorch's layer norm does the rest.
    """
    order, width = sum(lengths), x.shape[-1]
    x = _widened(x.reshape(math.prod(x.shape[:-1]), width))
    tensors = _segment_tensors(lengths, weights, width // order, x.dtype, x.device)
    averaging, factors, inverse_factors = tensors
    copies = x.view(-1, order, width // order)
    # No matrix product, which may be in TF32.
    means = (copies.mean(-1, keepdim=True) * averaging).sum(1)
    # Of operators that broadcast, those with two operands are fast on a CPU, addcmul is not.
    centred = torch.sub(copies, means.unsqueeze(-1)).view(x.shape)
    return centred.mul_(factors), inverse_factors


@lru_cache(maxsize=64)
def _segment_tensors(
    lengths: tuple[int, ...],
    weights: tuple[float, ...],
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """The share of a copy's mean in those of its segment's copies [G G]; factors [D], inverse."""
    with torch.inference_mode(False):
        averaging = torch.block_diag(*(torch.full((n, n), 1 / n).double() for n in lengths))
        pairs = zip(lengths, weights, strict=True)
        roots = [math.sqrt(weight / n) for n, weight in pairs for _ in range(n)]
        factors = torch.tensor(roots, dtype=torch.float64).repeat_interleave(channels)
        inverse = (1 / factors).to(device, dtype)
        return averaging.to(device, dtype), factors.to(device, dtype), inverse


def _affine(
    scales: Sequence[Tensor],
    shared: tuple[int, ...],
    shift: Tensor | None,
    inverse_factors: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias [D] of the layer norm of centred features."""
    weight = inverse_factors
    if scales:
        weight = by_segment(scales, shared).to(weight.dtype) * weight
    if shift is None:
        return weight, None
    return weight, F.pad(shift.to(weight.dtype), (0, weight.shape[0] - shift.shape[0]))


def by_segment(scales: Sequence[Tensor], shared: Sequence[int]) -> Tensor:
    """The factors [D] of all channels; shared[i] consecutive segments use scales[i]."""
    pairs = zip(scales, shared, strict=True)
    return torch.cat([scale for scale, count in pairs for _ in range(count)])


def plain_gelu(x: Tensor, bias: Tensor | None, transform: Matrix) -> Tensor:
    """Compute `regular_gelu` with PyTorch's operators, without autograd."""
    y = torch.empty_like(x)
    x = x if bias is None else with_bias(_widened(x), bias)
    for back, part, out in _pieces(transform, x, y):
        hidden = torch.bmm(back.mT, _widened(part))
        _bmm(back, torch.ops.aten.gelu_(hidden), out)
    return y


def plain_gelu_backward(x: Tensor, bias: Tensor | None, grad: Tensor, transform: Matrix) -> Tensor:
    """Gradient of x."""
    dx = torch.empty_like(x)
    x = x if bias is None else with_bias(_widened(x), bias)
    for back, part, slope, out in _pieces(transform, x, grad, dx):
        hidden = torch.bmm(back.mT, _widened(part))
        slope = torch.bmm(back.mT, _widened(slope))
        _bmm(back, torch.ops.aten.gelu_backward(slope, hidden), out)
    return dx


def with_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    """x, with the bias [C] on its first C channels."""
    return x if bias is None else x + F.pad(bias.to(x.dtype), (0, x.shape[-1] - len(bias)))


def _pieces(transform: Matrix, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tuples of `transform`, expanded to [n G G], and pieces [n G C] of the dense tensors [... D].

    On a CPU a piece stays in the cache from the first transform to the last, and its temporary
    memory is reused for the next one: this saves as much time as the transforms take. Elsewhere
    there is one piece.
    """
    order, (x, *_) = len(transform), tensors
    shape = (-1, order, x.shape[-1] // order)
    rows = x.numel() // max(1, x.shape[-1])
    step = rows if x.device.type != "cpu" else max(1, PIECE // max(1, x.shape[-1]))
    dtype = torch.promote_types(x.dtype, torch.float32)
    back = _matrix_tensor(transform, dtype, x.device).expand(min(step, rows), order, order)
    if rows <= step:
        if x.numel():
            yield back, *(tensor.view(shape) for tensor in tensors)
        return
    for parts in zip(*(tensor.view(shape).split(step) for tensor in tensors), strict=True):
        yield back[: parts[0].shape[0]], *parts


def _bmm(first: Tensor, second: Tensor, out: Tensor) -> None:
    """Write the product into `out`, rounded to its dtype."""
    if out.dtype == second.dtype:
        torch.bmm(first, second, out=out)
    else:
        out.copy_(torch.bmm(first, second))


@lru_cache(maxsize=64)
def _matrix_tensor(matrix: Matrix, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(matrix, dtype=dtype, device=device)


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def plain_split(
    x: Tensor, bias: Tensor | None, heads: int, widths: Sequence[int], parts: int
) -> list[Tensor]:
    """Compute `octic.heads.split_heads` with PyTorch's operators."""
    rows = with_bias(x, bias).split([parts * heads * width for width in widths], dim=-1)
    by_part = [row.unflatten(-1, (parts, heads, -1)).unbind(-3) for row in rows]
    return [torch.cat(own, dim=-1) for own in zip(*by_part, strict=True)]


def plain_join(tensors: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
    """Compute `octic.heads.join_heads` with PyTorch's operators."""
    rows = zip(*(t.split(list(widths), dim=-1) for t in tensors), strict=True)
    return torch.cat([part.flatten(-2) for row in rows for part in row], dim=-1)
