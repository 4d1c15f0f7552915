"""Plain PyTorch twins of the Triton kernels: every device, float64 too; written for few passes.

They compute forward and backward without autograd (`octic.kernels` ties them together) and are what
the Triton kernels are tested against. Letters as in `octic.kernels`.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

Matrix = tuple[tuple[float, ...], ...]


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
