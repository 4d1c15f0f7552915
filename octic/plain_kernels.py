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

Matrix = tuple[tuple[float, ...], ...]
PIECE = 2**18  # values; with those between its steps about the last cache that a core has to itself


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
    y = torch.empty_like(x)
    for back, part, out in _pieces(transform, x, y):
        hidden = torch.bmm(back.mT, _statistics_dtype(part))
        _bmm(back, torch.ops.aten.gelu_(hidden), out)
    return y


def plain_gelu_backward(x: Tensor, grad: Tensor, transform: Matrix) -> Tensor:
    """Gradient of x."""
    dx = torch.empty_like(x)
    for back, part, slope, out in _pieces(transform, x, grad, dx):
        hidden = torch.bmm(back.mT, _statistics_dtype(part))
        slope = torch.bmm(back.mT, _statistics_dtype(slope))
        _bmm(back, torch.ops.aten.gelu_backward(slope, hidden), out)
    return dx


def _pieces(transform: Matrix, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Pieces [n G C] of dense tensors [... D], after the matrices [n G G] that take them back.

    On a CPU a piece stays in its cache from the first transform to the last, and the memory of a
    piece is used again for the next: as much time as the transforms themselves take.
    """
    order, (x, *_) = len(transform), tensors
    shape = (-1, order, x.shape[-1] // order)
    rows = x.numel() // max(1, x.shape[-1])
    step = rows if x.device.type != "cpu" else max(1, PIECE // max(1, x.shape[-1]))
    dtype = torch.promote_types(x.dtype, torch.float32)
    back = _matrix_tensor(transform, dtype, x.device).expand(min(step, rows), order, order)
    if not x.numel():
        return
    for parts in zip(*(tensor.view(shape).split(step) for tensor in tensors), strict=True):
        yield back[: len(parts[0])], *parts


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


def _statistics_dtype(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
