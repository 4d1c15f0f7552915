"""Our operators in PyTorch's words, for programs that run where octic is not (`vit.export`).

Functions of the operators' own arguments, forward alone and without in-place operations; importing
`octic` makes them known. Letters as in `octic.irrep_norm` and `octic.irrep_linear`.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from octic import heads, irrep_linear, irrep_norm, matrices, regular_gelu  # noqa: F401  (these define operators)
from octic.plain_kernels import by_segment, plain_join, plain_split, with_bias
from vit.export import DECOMPOSITIONS


def norm(
    x: Tensor,
    scales: Sequence[Tensor],
    shift: Tensor | None,
    lengths: Sequence[int],
    weights: Sequence[float],
    shared: Sequence[int],
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Compute `octic::irrep_norm`."""
    wide = _statistics_dtype(x)
    order = sum(lengths)
    channels, start = x.shape[-1] // order, 0
    centred, variances = [], []
    for (length, weight), equal in groupby(zip(lengths, weights, strict=True)):
        count, width = len(list(equal)), length * channels
        part = wide[..., start : start + count * width].unflatten(-1, (count, width))
        part = part - part.mean(-1, keepdim=True)
        centred.append(part.flatten(-2))
        variances.append(part.square().sum((-2, -1)) * (weight / width))
        start += count * width
    variance = torch.stack(variances).sum(0) + eps
    y = torch.cat(centred, -1) * (variance / order).rsqrt()[..., None]
    if scales:
        y = y * by_segment(scales, shared)
    if shift is not None:
        y = y + F.pad(shift, (0, x.shape[-1] - shift.shape[0]))
    return y.to(dtype)


def residual_norm(
    x: Tensor, branch: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """Compute `octic::residual_norm`."""
    total = x + with_bias(branch, bias)
    return total, norm(total, *arguments)


def stack(tensors: Sequence[Tensor], layout: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Compute `octic::stack_matrices`."""
    layers = matrices.layers_of(tensors, layout)
    found = [part for layer in layers for part in matrices.plain_stack(layer, dtype)]
    return [part for part in found if part is not None]


def gelu(x: Tensor, bias: Tensor | None, transform: Sequence[float]) -> Tensor:
    """Compute `octic::regular_gelu`."""
    order = math.isqrt(len(transform))
    wide = _statistics_dtype(with_bias(x, bias)).unflatten(-1, (order, x.shape[-1] // order))
    matrix = torch.tensor(list(transform), dtype=wide.dtype, device=x.device).view(order, order)
    return (matrix @ F.gelu(matrix.T @ wide)).flatten(-2).to(x.dtype)


def linear(x: Tensor, lines: Tensor, plane: Tensor | None, bias: Tensor | None) -> Tensor:
    """Compute `octic::irrep_linear`."""
    count, _, channels = lines.shape
    split = count * channels
    first = x[:, :split].unflatten(1, (count, channels)).transpose(0, 1)
    out = torch.bmm(first, lines.transpose(1, 2)).transpose(0, 1).flatten(1)
    if plane is not None:
        width = plane.shape[1]
        rows = x[:, split:].unflatten(1, ((x.shape[1] - split) // width, width))
        out = torch.cat([out, F.linear(rows, plane).flatten(1)], 1)
    if bias is not None:
        out = out + F.pad(bias, (0, out.shape[1] - bias.shape[0]))
    return out


def _statistics_dtype(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


DECOMPOSITIONS.update(
    {
        torch.ops.octic.irrep_norm.default: norm,
        torch.ops.octic.residual_norm.default: residual_norm,
        torch.ops.octic.regular_gelu.default: gelu,
        torch.ops.octic.irrep_linear.default: linear,
        torch.ops.octic.stack_matrices.default: stack,
        torch.ops.octic.split_heads.default: plain_split,
        torch.ops.octic.join_heads.default: plain_join,
    }
)
