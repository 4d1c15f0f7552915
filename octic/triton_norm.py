"""Triton kernels of the norms of `octic.irrep_norm`; imported only when a CUDA tensor needs them.

A program walks over tokens and holds the channels of one in registers as a tile [G C]: one read
and one write of each tensor, the sum with a branch included. What does not depend on the token
(scale, shift, which channels share a mean) is read once per program. The backward pass computes
the statistics again from x, so nothing else is saved; it sums the parameters' gradients per
program, and the host adds these sums in a fixed order (no atomics: the same bits every time). No
autotuning: the launch depends on the width alone.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octic.device import processors
from octic.triton_tiles import ceil_div

# Of all these an H200 was tried with 8, 16 and 32; 16, 24, 32 and 64; 1, 2 and 3 (ViT-S to ViT-H).
VALUES_PER_THREAD = 8  # twice as many where that saves warps beyond the fourth, which wait in sums
WARPS = 16  # for each streaming multiprocessor
AHEAD = 3  # stages of a load, which runs ahead of the arithmetic through shared memory
AHEAD_VALUES = 2048  # of a row; wider ones would need more shared memory than every GPU has


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
def _scales(
    scale_ptrs,
    C: tl.constexpr,
    GP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Tile [GP BLOCK_C] of the factors, by the tensors that segments share; or ones."""
    row = tl.arange(0, GP)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    scale = tl.full([GP, BLOCK_C], 1.0, tl.float32)
    # The compiler goes on after a return here, to tensors that are not there: hence no return.
    if SCALE:
        scale = tl.zeros([GP, BLOCK_C], tl.float32)
        for s in tl.static_range(len(SEGMENTS)):
            member = (row >= SEGMENTS[s][0]) & (row < SEGMENTS[s][0] + SEGMENTS[s][1])
            factors = scale_ptrs[SEGMENTS[s][3]] + (row - SEGMENTS[s][0]) * C + channel
            factors = tl.load(factors, mask=member & (channel < C), other=0.0)
            scale += factors.to(tl.float32)
    return scale


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
    branch_ptr,
    bias_ptr,
    factor_ptr,
    scale_ptrs,
    shift_ptr,
    total_ptr,
    y_ptr,
    rows,
    eps,
    C: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BRANCH: tl.constexpr,
    BIAS: tl.constexpr,
    FACTOR: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    AHEAD: tl.constexpr,
):
    group = tl.arange(0, GP)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    offsets = group * C + channel
    mask = (group < G) & (channel < C)
    average = _averaging(C, G, GP, SEGMENTS)
    weight = _variance_weights(C, GP, SEGMENTS)
    scale = _scales(scale_ptrs, C, GP, BLOCK_C, SEGMENTS, SCALE)
    bias = tl.zeros([GP, BLOCK_C], tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + offsets, mask=mask & (group == 0), other=0.0).to(tl.float32)
    shift = tl.zeros([GP, BLOCK_C], tl.float32)
    if SHIFT:
        shift = tl.load(shift_ptr + offsets, mask=mask & (group == 0), other=0.0).to(tl.float32)
    first_row = tl.program_id(0).to(tl.int64)
    for row in tl.range(first_row, rows, tl.num_programs(0), num_stages=AHEAD):
        start = row * (G * C)
        x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        if BRANCH:
            branch = tl.load(branch_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
            branch += bias
            if FACTOR:
                branch *= tl.load(factor_ptr + row).to(tl.float32)
            # What is normalised is what is stored, rounded.
            total = (x + branch).to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + start + offsets, total, mask=mask)
            x = total.to(tl.float32)
        y, _ = _normalised(x, mask, average, weight, eps, G)
        y = y * scale + shift
        tl.store(y_ptr + start + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "eps"])
def backward_kernel(
    x_ptr,
    grad_ptr,
    past_ptr,
    factor_ptr,
    scale_ptrs,
    dx_ptr,
    dbranch_ptr,
    sums_ptr,
    rows,
    eps,
    C: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PAST: tl.constexpr,
    BRANCH: tl.constexpr,
    FACTOR: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    AHEAD: tl.constexpr,
):
    group = tl.arange(0, GP)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    offsets = group * C + channel
    mask = (group < G) & (channel < C)
    average = _averaging(C, G, GP, SEGMENTS)
    weight = _variance_weights(C, GP, SEGMENTS)
    first = tl.arange(0, BLOCK_C)  # the channels that the shift acts on
    scale = _scales(scale_ptrs, C, GP, BLOCK_C, SEGMENTS, SCALE)
    dscale = tl.zeros([GP, BLOCK_C], tl.float32)
    dshift = tl.zeros([BLOCK_C], tl.float32)
    first_row = tl.program_id(0).to(tl.int64)
    for row in tl.range(first_row, rows, tl.num_programs(0), num_stages=AHEAD):
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
        if PAST:
            dx += tl.load(past_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        if BRANCH:
            dbranch = dx
            if FACTOR:
                dbranch *= tl.load(factor_ptr + row).to(tl.float32)
            dbranch = dbranch.to(dbranch_ptr.dtype.element_ty)
            tl.store(dbranch_ptr + start + offsets, dbranch, mask=mask)
        tl.store(dx_ptr + start + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    sums_ptr += tl.program_id(0).to(tl.int64) * (SCALE * G * C + SHIFT * C)
    if SCALE:
        tl.store(sums_ptr + offsets, dscale, mask=mask)
    if SHIFT:
        tl.store(sums_ptr + SCALE * G * C + first, dshift, mask=first < C)


@triton.jit(do_not_specialize=["programs"])
def sum_kernel(
    sums_ptr,
    total_ptr,
    programs,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Sums of the columns of [programs WIDTH], in the same order every time."""
    column = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    total = tl.zeros([BLOCK_P, BLOCK_W], tl.float32)
    for first in range(0, programs, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)
        mask = (program < programs)[:, None] & (column < WIDTH)[None, :]
        offsets = program[:, None] * WIDTH + column[None, :]
        total += tl.load(sums_ptr + offsets, mask=mask, other=0.0)
    tl.store(total_ptr + column, tl.sum(total, axis=0), mask=column < WIDTH)


def forward(
    x: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    factors: Tensor | None,
    scales: tuple[Tensor, ...],
    shift: Tensor | None,
    lengths: tuple[int, ...],
    weights: tuple[float, ...],
    shared: tuple[int, ...],
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x + branch, contiguous [..., G*C] each, in the wider dtype, and its norm, a tensor of dtype.

    A bias [C] is added to the branch's first C channels, and the factors [..., 1] multiply both.
    Without a branch the first result is x itself.
    """
    total = x
    if branch is not None:
        total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, branch.dtype))
    y = torch.empty_like(x, dtype=dtype)
    if x.numel() == 0:
        return total, y
    given = {"BRANCH": branch is not None, "BIAS": bias is not None, "FACTOR": factors is not None}
    given |= {"SCALE": bool(scales), "SHIFT": shift is not None}
    arguments = options(x.shape[-1], lengths, weights, shared) | given
    rows = x.numel() // x.shape[-1]
    # A kernel argument that is not read still has to be a tensor.
    read = (x if part is None else part for part in (branch, bias, factors, scales, shift))
    programs = _programs(x, rows, WARPS // arguments["num_warps"])
    forward_kernel[(programs,)](x, *read, total, y, rows, eps, **arguments)
    return total, y


def backward(
    x: Tensor,
    grad: Tensor,
    past: Tensor | None,
    factors: Tensor | None,
    branch_dtype: torch.dtype | None,
    scales: tuple[Tensor, ...],
    shift: Tensor | None,
    lengths: tuple[int, ...],
    weights: tuple[float, ...],
    shared: tuple[int, ...],
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (its dtype), of the branch (`branch_dtype`), of the scales by segment [D]
    and of the shift (float32).

    x, grad and past are contiguous [..., G*C]; past, the gradient that x has from elsewhere, is
    added. The branch's gradient is that of x, times the factors [..., 1].
    """
    dx = torch.empty_like(x)
    dbranch = None if branch_dtype is None else torch.empty_like(x, dtype=branch_dtype)
    given = {"PAST": past is not None, "BRANCH": dbranch is not None, "FACTOR": factors is not None}
    given |= {"SCALE": bool(scales), "SHIFT": shift is not None}
    arguments = options(x.shape[-1], lengths, weights, shared) | given
    rows = x.numel() // x.shape[-1]
    width = (x.shape[-1] if scales else 0) + (0 if shift is None else arguments["C"])
    programs = _programs(x, rows, WARPS // arguments["num_warps"])
    sums = x.new_empty(programs, width, dtype=torch.float32)
    if rows:
        read = (x, grad, *(x if part is None else part for part in (past, factors)), scales)
        written = (dx, dx if dbranch is None else dbranch, sums)
        backward_kernel[(programs,)](*read, *written, rows, eps, **arguments)
    totals = _sum_programs(sums)
    dscales = totals[: x.shape[-1]] if scales else None
    dshift = None if shift is None else totals[width - arguments["C"] :]
    return dx, dbranch, dscales, dshift


def _sum_programs(sums: Tensor) -> Tensor:
    programs, width = sums.shape
    if not sums.numel():
        return sums.new_zeros(width)
    totals = sums.new_empty(width)
    sum_kernel[(ceil_div(width, 32),)](
        *(sums, totals, programs),
        WIDTH=width,
        BLOCK_P=64,
        BLOCK_W=32,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return totals


@lru_cache(maxsize=256)  # a launch costs the host less
def options(
    width: int, lengths: tuple[int, ...], weights: tuple[float, ...], shared: tuple[int, ...]
) -> dict[str, Any]:
    """Compile-time arguments for features of `width` channels.

    A segment is told by start, length, weight and the number of its scale.
    """
    order = sum(lengths)
    channels = width // order
    padded, block_c = triton.next_power_of_2(order), triton.next_power_of_2(channels)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    owners = [number for number, count in enumerate(shared) for _ in range(count)]
    owners = owners or [0] * len(lengths)  # nobody's, where there are no scales
    warps = padded * block_c // (32 * VALUES_PER_THREAD)
    warps = max(4, warps // 2) if warps > 4 else warps
    return {
        "C": channels,
        "G": order,
        "GP": padded,
        "BLOCK_C": block_c,
        "SEGMENTS": tuple(zip(starts, lengths, weights, owners, strict=True)),
        "AHEAD": AHEAD if padded * block_c <= AHEAD_VALUES else 1,
        "num_warps": min(max(warps, 1), 16),
        "enable_fp_fusion": True,
    }


def _programs(x: Tensor, rows: int, per_processor: int) -> int:
    return min(rows, per_processor * processors(x.device))
