"""Triton kernels of `octic.kernels.irrep_norm`; imported only when a CUDA tensor needs them.

A program walks over tokens and holds the channels of one in registers as a tile [G C]: one read
and one write. What does not depend on the token (scale, shift, which channels share a mean) is read
once per program. The backward pass computes the statistics again from x, so nothing else is saved;
it sums the parameters' gradients per program, and the host adds these sums in a fixed order (no
atomics: the same bits every time). No autotuning: the launch depends on the width alone.
"""

# Arguments of a Triton function have no Python types.
# ruff: noqa: ANN001, ANN201, ANN202, D103
# mypy: disable-error-code="assignment, attr-defined"

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES_PER_THREAD = 16
# Warps for each streaming multiprocessor; with the kernels' 64 and 96 registers all are resident.
FORWARD_WARPS = 32
BACKWARD_WARPS = 16


@triton.jit
def _averaging(C: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, SEGMENTS: tl.constexpr):
    """Matrix [GP GP] from the sums of a tile's rows to the means of their segments."""
    row = tl.arange(0, GP)
    average = tl.zeros([GP, GP], tl.float32)
    for s in tl.static_range(len(SEGMENTS)):
        member = (row >= SEGMENTS[s][0]) & (row < SEGMENTS[s][0] + SEGMENTS[s][1])
        average += tl.where(member[:, None] & member[None, :], 1.0 / (SEGMENTS[s][1] * C), 0.0)
    return average


@triton.jit
def _variance_weights(C: tl.constexpr, GP: tl.constexpr, SEGMENTS: tl.constexpr):
    """Weight [GP] of a squared deviation in the variance."""
    row = tl.arange(0, GP)
    weight = tl.zeros([GP], tl.float32)
    for s in tl.static_range(len(SEGMENTS)):
        member = (row >= SEGMENTS[s][0]) & (row < SEGMENTS[s][0] + SEGMENTS[s][1])
        weight += tl.where(member, SEGMENTS[s][2] / (SEGMENTS[s][1] * C), 0.0)
    return weight


@triton.jit
def _segment_means(tile, average):
    return tl.sum(average * tl.sum(tile, axis=1)[None, :], axis=1)


@triton.jit
def _normalised(x, mask, average, weight, eps, G: tl.constexpr):
    """x without the means of its segments, over the common deviation; and 1 / deviation."""
    centred = tl.where(mask, x - _segment_means(x, average)[:, None], 0.0)
    variance = tl.sum(tl.sum(centred * centred, axis=1) * weight, axis=0)
    inverse = 1.0 / tl.sqrt((variance + eps) / G)
    return centred * inverse, inverse


@triton.jit(do_not_specialize=["rows", "eps"])
def forward_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    rows,
    eps,
    C: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    group = tl.arange(0, GP)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    offsets = group * C + channel
    mask = (group < G) & (channel < C)
    average = _averaging(C, G, GP, SEGMENTS)
    weight = _variance_weights(C, GP, SEGMENTS)
    scale = tl.full([GP, BLOCK_C], 1.0, tl.float32)
    if SCALE:
        scale = tl.load(scale_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    shift = tl.zeros([GP, BLOCK_C], tl.float32)
    if SHIFT:
        shift = tl.load(shift_ptr + offsets, mask=mask & (group == 0), other=0.0).to(tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        start = row * (G * C)
        x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        y, _ = _normalised(x, mask, average, weight, eps, G)
        y = y * scale + shift
        tl.store(y_ptr + start + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "eps"])
def backward_kernel(
    x_ptr,
    grad_ptr,
    scale_ptr,
    dx_ptr,
    dscale_ptr,
    dshift_ptr,
    rows,
    eps,
    C: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    group = tl.arange(0, GP)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    offsets = group * C + channel
    mask = (group < G) & (channel < C)
    average = _averaging(C, G, GP, SEGMENTS)
    weight = _variance_weights(C, GP, SEGMENTS)
    first = tl.arange(0, BLOCK_C)  # the channels that the shift acts on
    scale = tl.full([GP, BLOCK_C], 1.0, tl.float32)
    if SCALE:
        scale = tl.load(scale_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    dscale = tl.zeros([GP, BLOCK_C], tl.float32)
    dshift = tl.zeros([BLOCK_C], tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        start = row * (G * C)
        x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        hat, inverse = _normalised(x, mask, average, weight, eps, G)
        if SCALE:
            dscale += grad * hat
        if SHIFT:
            dshift += tl.load(grad_ptr + start + first, mask=first < C, other=0.0).to(tl.float32)
        grad = grad * scale
        along = tl.sum(tl.sum(grad * hat, axis=1), axis=0) / G
        grad -= _segment_means(grad, average)[:, None]
        dx = (grad - hat * (weight * along)[:, None]) * inverse
        tl.store(dx_ptr + start + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    program = tl.program_id(0).to(tl.int64)
    if SCALE:
        tl.store(dscale_ptr + program * (G * C) + offsets, dscale, mask=mask)
    if SHIFT:
        tl.store(dshift_ptr + program * C + first, dshift, mask=first < C)


def forward(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    lengths: tuple[int, ...],
    weights: tuple[float, ...],
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Normalise a contiguous x [..., G*C] into a tensor of dtype."""
    y = x.new_empty(x.shape, dtype=dtype)
    if x.numel() == 0:
        return y
    given = {"SCALE": scale is not None, "SHIFT": shift is not None}
    arguments = options(x.shape[-1], lengths, weights) | given
    rows = x.numel() // x.shape[-1]
    # A kernel argument that is not read still has to be a tensor.
    tensors = (x, x if scale is None else scale, x if shift is None else shift, y)
    forward_kernel[(_programs(x, rows, FORWARD_WARPS // arguments["num_warps"]),)](
        *tensors, rows, eps, **arguments
    )
    return y


def backward(
    x: Tensor,
    grad: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    lengths: tuple[int, ...],
    weights: tuple[float, ...],
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x (its dtype), scale and shift (float32); x and grad contiguous [..., G*C]."""
    dx = x.new_empty(x.shape)
    given = {"SCALE": scale is not None, "SHIFT": shift is not None}
    arguments = options(x.shape[-1], lengths, weights) | given
    rows = x.numel() // x.shape[-1]
    programs = _programs(x, rows, BACKWARD_WARPS // arguments["num_warps"])
    dscale = x.new_empty(programs if scale is not None else 0, x.shape[-1], dtype=torch.float32)
    dshift = x.new_empty(programs if shift is not None else 0, arguments["C"], dtype=torch.float32)
    if rows:
        tensors = (x, grad, x if scale is None else scale, dx, dscale, dshift)
        backward_kernel[(programs,)](*tensors, rows, eps, **arguments)
    return dx, None if scale is None else dscale.sum(0), None if shift is None else dshift.sum(0)


@lru_cache(maxsize=256)  # a launch costs the host less
def options(width: int, lengths: tuple[int, ...], weights: tuple[float, ...]) -> dict[str, Any]:
    """Compile-time arguments for features of `width` channels."""
    order = sum(lengths)
    channels = width // order
    padded, block_c = triton.next_power_of_2(order), triton.next_power_of_2(channels)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    warps = padded * block_c // (32 * VALUES_PER_THREAD)
    return {
        "C": channels,
        "G": order,
        "GP": padded,
        "BLOCK_C": block_c,
        "SEGMENTS": tuple(zip(starts, lengths, weights, strict=True)),
        "num_warps": min(max(warps, 1), 16),
        "enable_fp_fusion": True,
    }


def _programs(x: Tensor, rows: int, per_processor: int) -> int:
    return min(rows, per_processor * _processors(x.device))


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1  # Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count
