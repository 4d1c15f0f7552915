"""Independent definitions of the two operators, and the cases their tests share."""

import math
from typing import Any

import torch
from torch import Tensor

from octic.groups import get_group
from octic.irrep_norm import irrep_norm, residual_norm
from octic.layer_tensors import Sources

# Segments (length, weight) of features over groups of order 8, 4, 2, and of one that is no group's.
SEGMENTS = {
    "octic": ((1, 1.0), (1, 1.0), (1, 1.0), (1, 1.0), (2, 0.5), (2, 0.5)),
    "rotations": ((1, 1.0), (1, 1.0), (1, 0.5), (1, 0.5)),
    "mirror": ((1, 1.0), (1, 1.0)),
    "odd": ((1, 2.0), (2, 0.3)),
}
TRANSFORMS = {name: get_group(name).fourier.tolist() for name in ("D4", "C4", "V4", "mirror")}
_rotation = [[math.cos(0.3), -math.sin(0.3)], [math.sin(0.3), math.cos(0.3)]]
TRANSFORMS = {
    name: tuple(map(tuple, rows)) for name, rows in (TRANSFORMS | {"dense": _rotation}).items()
}


def norm_by_definition(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, segments: tuple, eps: float
) -> Tensor:
    """Segment by segment, in the dtype of x (octic-vits, LayerNormD8)."""
    order = sum(length for length, _ in segments)
    channels = x.shape[-1] // order
    parts = x.split([length * channels for length, _ in segments], dim=-1)
    variances = [part.var(-1, correction=0, keepdim=True) for part in parts]
    total = sum(weight * var for (_, weight), var in zip(segments, variances, strict=True))
    sigma = torch.sqrt((total + eps) / order)
    y = torch.cat([(part - part.mean(-1, keepdim=True)) / sigma for part in parts], dim=-1)
    if scale is not None:
        y = y * scale
    if shift is not None:
        y = y + torch.cat([shift, shift.new_zeros(x.shape[-1] - channels)])
    return y


def plan_of(segments: tuple) -> tuple[tuple, ...]:
    """Lengths and weights of the segments, and that each has a scale of its own."""
    return *zip(*segments, strict=True), (1,) * len(segments)


def parted(scale: Tensor | None, segments: tuple) -> tuple[Tensor, ...]:
    """The factors [D] of all channels as those of each segment."""
    if scale is None:
        return ()
    channels = len(scale) // sum(length for length, _ in segments)
    return scale.split([length * channels for length, _ in segments])


def norm_of(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    segments: tuple,
    **options: Any,
) -> Tensor:
    """`irrep_norm` with the factors of all channels as one tensor [D]."""
    return irrep_norm(x, parted(scale, segments), shift, segments=segments, **options)


def norm_of_sum(
    x: Tensor,
    branch: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    segments: tuple,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`residual_norm` with the factors of all channels as one tensor [D]."""
    return residual_norm(x, branch, parted(scale, segments), shift, segments=segments, **options)


def gelu_by_definition(x: Tensor, transform: tuple) -> Tensor:
    """Fourier transform, x times the normal distribution function, and back; dtype of x."""
    matrix = torch.tensor(transform, dtype=x.dtype, device=x.device)
    hidden = torch.einsum("gh,...gc->...hc", matrix, x.unflatten(-1, (len(matrix), -1)))
    hidden = hidden * 0.5 * torch.erfc(-hidden / math.sqrt(2))
    return torch.einsum("gh,...hc->...gc", matrix, hidden).flatten(-2)


def norm_inputs(
    segments: tuple,
    *,
    tokens: tuple[int, ...],
    channels: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> list[Tensor]:
    """x with an offset for each channel, scale, shift, and a gradient."""
    width = channels * sum(length for length, _ in segments)
    options = {"dtype": torch.float64, "device": device}
    x = 3 * torch.randn(*tokens, width, **options) + torch.randn(width, **options)
    scale, shift = 1 + 0.3 * torch.randn(width, **options), torch.randn(channels, **options)
    grad = torch.randn(*tokens, width, **options)
    return [tensor.to(dtype) for tensor in (x, scale, shift, grad)]


def gradients(function, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The value of function(*inputs) and its gradients."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype))]


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Largest deviation over the largest value."""
    return ((ours.double() - exact.double()).abs().max() / exact.double().abs().max()).item()


def matrix_sources(
    *,
    scaled: bool,
    biased: bool,
    lines: int = 4,
    planes: int = 1,
    given: int = 2,
    wanted: int = 3,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Sources:
    """Random weights of a layer of `given` channels a copy to `wanted`, factors and bias."""
    options = {"dtype": dtype, "device": device}
    weights = [
        *torch.randn(lines, wanted, given, **options),
        *torch.randn(planes, 2 * wanted, 2 * given, **options),
    ]
    factors = [torch.randn(len(weight), **options) for weight in weights if scaled]
    return Sources(weights, torch.randn(wanted, **options) if biased else None, factors, lines)
