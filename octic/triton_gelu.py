"""Triton kernels of `octic.regular_gelu`; imported only when a CUDA tensor needs them.

A program owns a tile of tokens and channels and holds all G components of it in registers. The
transform is no matrix product but the shortest list of additions that a greedy search finds: 24 for
the octic group, a butterfly, against 64 multiply-adds. All arithmetic is float32 and the result is
rounded once. No autotuning: the tile depends on the channel count alone.
"""

from collections import Counter
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octic.plain_kernels import Matrix
from octic.triton_tiles import ceil_div, tile_width

TILE = 512  # tokens x channels of one program: 4 values of each component per thread


@triton.jit
def _transformed(values, STEPS: tl.constexpr, OUTPUTS: tl.constexpr):
    """Run a straight-line program of `straight_line_program` on a tuple of tiles."""
    for k in tl.static_range(len(STEPS)):
        values = values + (values[STEPS[k][0]] + values[STEPS[k][1]] * STEPS[k][2],)
    outputs = ()
    for k in tl.static_range(len(OUTPUTS)):
        outputs = outputs + (values[OUTPUTS[k][0]] * OUTPUTS[k][1],)
    return outputs


@triton.jit
def _upper_tail(h):
    """1 - Phi(|h|) of the normal distribution, and exp(-h^2 / 2).

    Abramowitz and Stegun 1964, 7.1.26, error at most 7.5e-8: two special functions and seven
    multiply-adds, where erf takes enough arithmetic to hold up a kernel that only waits for memory.
    """
    t = 1.0 / (1.0 + 0.23164189 * tl.abs(h))
    bell = tl.exp(-0.5 * h * h)
    series = 0.5307027145 * t - 0.7265760135
    series = series * t + 0.7107068705
    series = series * t - 0.142248368
    return (series * t + 0.127414796) * t * bell, bell


@triton.jit
def _tile(rows, C: tl.constexpr, G: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets (int64) and mask of this program's tile of the first component."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets = row[:, None] * (G * C) + channel[None, :]
    return offsets, (row < rows)[:, None] & (channel < C)[None, :]


@triton.jit
def _components(
    x_ptr,
    bias_ptr,
    offsets,
    mask,
    C: tl.constexpr,
    G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BIAS: tl.constexpr,
):
    """The G components of this program's tile in float32, with the bias added to the first."""
    values = ()
    for g in tl.static_range(G):
        value = tl.load(x_ptr + offsets + g * C, mask=mask, other=0.0).to(tl.float32)
        if BIAS and g == 0:
            channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
            bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0)
            value += bias.to(tl.float32)[None, :]
        values = values + (value,)
    return values


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    rows,
    C: tl.constexpr,
    G: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IN_STEPS: tl.constexpr,
    IN_OUTPUTS: tl.constexpr,
    OUT_STEPS: tl.constexpr,
    OUT_OUTPUTS: tl.constexpr,
):
    offsets, mask = _tile(rows, C, G, BLOCK_R, BLOCK_C)
    values = _components(x_ptr, bias_ptr, offsets, mask, C, G, BLOCK_C, BIAS)
    hidden = _transformed(values, IN_STEPS, IN_OUTPUTS)
    active = ()
    for g in tl.static_range(G):
        h = hidden[g]
        tail, _ = _upper_tail(h)
        active = active + (tl.maximum(h, 0.0) - tl.abs(h) * tail,)
    outputs = _transformed(active, OUT_STEPS, OUT_OUTPUTS)
    for g in tl.static_range(G):
        tl.store(y_ptr + offsets + g * C, outputs[g].to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    x_ptr,
    bias_ptr,
    grad_ptr,
    dx_ptr,
    rows,
    C: tl.constexpr,
    G: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IN_STEPS: tl.constexpr,
    IN_OUTPUTS: tl.constexpr,
    OUT_STEPS: tl.constexpr,
    OUT_OUTPUTS: tl.constexpr,
):
    offsets, mask = _tile(rows, C, G, BLOCK_R, BLOCK_C)
    values = _components(x_ptr, bias_ptr, offsets, mask, C, G, BLOCK_C, BIAS)
    hidden = _transformed(values, IN_STEPS, IN_OUTPUTS)
    slopes = ()
    for g in tl.static_range(G):
        h = hidden[g]
        tail, bell = _upper_tail(h)
        cumulative = tl.where(h > 0.0, 1.0 - tail, tail)
        slopes = slopes + (cumulative + h * bell * 0.3989422804014327,)
    grads = ()
    for g in tl.static_range(G):
        grads = grads + (tl.load(grad_ptr + offsets + g * C, mask=mask, other=0.0).to(tl.float32),)
    grads = _transformed(grads, IN_STEPS, IN_OUTPUTS)
    products = ()
    for g in tl.static_range(G):
        products = products + (grads[g] * slopes[g],)
    outputs = _transformed(products, OUT_STEPS, OUT_OUTPUTS)
    for g in tl.static_range(G):
        tl.store(dx_ptr + offsets + g * C, outputs[g].to(dx_ptr.dtype.element_ty), mask=mask)


def forward(x: Tensor, bias: Tensor | None, transform: Matrix) -> Tensor:
    """T gelu(T^t x) of a contiguous x [..., G*C]; a bias [C] is added to its first C channels."""
    y = torch.empty_like(x)
    _launch(forward_kernel, x, bias, (y,), transform)
    return y


def backward(x: Tensor, bias: Tensor | None, grad: Tensor, transform: Matrix) -> Tensor:
    """Gradient with respect to x; x and grad contiguous [..., G*C]."""
    dx = torch.empty_like(x)
    _launch(backward_kernel, x, bias, (grad, dx), transform)
    return dx


@lru_cache(maxsize=256)  # a launch costs the host less
def options(channels: int, transform: Matrix) -> dict[str, Any]:
    """Compile-time arguments for C = `channels`; they depend on the group and on C alone."""
    block_c = tile_width(channels, 32, 128)
    into, back = _programs(transform)
    return {
        "C": channels,
        "G": len(transform),
        "BLOCK_R": max(1, TILE // block_c),
        "BLOCK_C": block_c,
        "IN_STEPS": into[0],
        "IN_OUTPUTS": into[1],
        "OUT_STEPS": back[0],
        "OUT_OUTPUTS": back[1],
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def _launch(
    kernel: Any, x: Tensor, bias: Tensor | None, others: tuple[Tensor, ...], transform: Matrix
) -> None:
    if x.numel() == 0:
        return
    channels = x.shape[-1] // len(transform)
    rows = x.numel() // x.shape[-1]
    arguments = options(channels, transform)
    grid = (ceil_div(rows, arguments["BLOCK_R"]), ceil_div(channels, arguments["BLOCK_C"]))
    # A kernel argument that is not read still has to be a tensor.
    read = (x, x if bias is None else bias)
    kernel[grid](*read, *others, rows, BIAS=bias is not None, **arguments)


@lru_cache(maxsize=64)
def _programs(transform: Matrix) -> tuple[tuple, tuple]:
    transposed = tuple(zip(*transform, strict=True))
    return straight_line_program(transposed), straight_line_program(transform)


def straight_line_program(matrix: Matrix) -> tuple[tuple, tuple]:
    """Steps and outputs that compute `matrix` times a vector in few additions.

    Step (a, b, ratio) appends value[a] + ratio * value[b] to the values (first the inputs); output
    (index, factor) reads factor * value[index]. Greedy: the pair of values that most rows share, in
    the same ratio, is added first (Paar 1997, there over the field of two elements).
    """
    rows = [{j: c for j, c in enumerate(row) if abs(c) > 1e-12} for row in matrix]
    steps: list[tuple[int, int, float]] = []
    while any(len(row) > 1 for row in rows):
        pairs = Counter(
            (a, b, round(row[b] / row[a], 12)) for row in rows for a in row for b in row if a < b
        )
        a, b, ratio = max(pairs, key=lambda pair: (pairs[pair], -abs(pair[2])))
        for row in rows:
            if a in row and b in row and round(row[b] / row[a], 12) == ratio:
                row[len(matrix) + len(steps)] = row.pop(a)
                del row[b]
        steps.append((a, b, ratio))
    return tuple(steps), tuple(next(iter(row.items())) for row in rows)
