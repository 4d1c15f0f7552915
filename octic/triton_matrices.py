"""Triton kernels of `octic.matrices`: the matrices of all irreps, of several layers, in one launch.

Torch takes a kernel each to stack, to scale and to cast, forward and backward: some thirty a block,
each shorter than its launch. A launch is a list of jobs, one a weight, dealt out over its programs;
the list is known when the kernel is compiled. Imported only when a CUDA tensor needs them.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octic.layer_tensors import Matrices, Sources
from octic.triton_tiles import ceil_div

BLOCK = 1024  # values of a program
BLOCK_R, BLOCK_C = 8, 128  # rows of a program in the backward pass, columns at a time


@triton.jit
def _scaled_copy(
    x_ptr,
    factor_ptr,
    y_ptr,
    tile,
    VALUES: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tile * BLOCK + tl.arange(0, BLOCK)
    mask = index < VALUES
    x = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        x *= tl.load(factor_ptr + index // COLUMNS, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + index, x.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def stack_kernel(source_ptrs, factor_ptrs, out_ptrs, JOBS: tl.constexpr, BLOCK: tl.constexpr):
    """JOBS: of each source its first tile, tiles, values, columns, factor, output, place in it."""
    program = tl.program_id(0)
    for j in tl.static_range(len(JOBS)):
        if (program >= JOBS[j][0]) & (program < JOBS[j][0] + JOBS[j][1]):
            _scaled_copy(
                source_ptrs[j],
                factor_ptrs[JOBS[j][4]],
                out_ptrs[JOBS[j][5]] + JOBS[j][6],
                program - JOBS[j][0],
                *(JOBS[j][2], JOBS[j][3], JOBS[j][4] > 0, BLOCK),
            )


@triton.jit
def _unscaled_rows(
    grad_ptr,
    x_ptr,
    factor_ptr,
    dx_ptr,
    dfactor_ptr,
    grad_bias_ptr,
    bias_ptr,
    dbias_ptr,
    tile,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of some rows of a matrix, of their factors and, with BIAS, of the bias beside."""
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < ROWS
    factor = tl.full([BLOCK_R], 1.0, tl.float32)
    if SCALED:
        factor = tl.load(factor_ptr + row, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, COLUMNS, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        offsets = row[:, None] * COLUMNS + column[None, :]
        mask = inside[:, None] & (column < COLUMNS)[None, :]
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if SCALED:
            total += grad * tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dx = grad * factor[:, None]
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    dfactor = tl.sum(total, axis=1)
    if BIAS:
        grad = tl.load(grad_bias_ptr + row, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            dfactor += grad * tl.load(bias_ptr + row, mask=inside, other=0.0).to(tl.float32)
        tl.store(dbias_ptr + row, (grad * factor).to(dbias_ptr.dtype.element_ty), mask=inside)
    if SCALED:
        tl.store(dfactor_ptr + row, dfactor.to(dfactor_ptr.dtype.element_ty), mask=inside)


@triton.jit
def unstack_kernel(
    grad_ptrs,
    weight_ptrs,
    bias_ptrs,
    factor_ptrs,
    dweight_ptrs,
    dbias_ptrs,
    dfactor_ptrs,
    JOBS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """JOBS: of each weight its first tile, tiles, rows, columns, factor, gradient, place in it,
    the bias beside it and that one's gradient.
    """
    program = tl.program_id(0)
    for j in tl.static_range(len(JOBS)):
        if (program >= JOBS[j][0]) & (program < JOBS[j][0] + JOBS[j][1]):
            _unscaled_rows(
                grad_ptrs[JOBS[j][5]] + JOBS[j][6],
                *(weight_ptrs[j], factor_ptrs[JOBS[j][4]], dweight_ptrs[j]),
                dfactor_ptrs[JOBS[j][4]],
                *(grad_ptrs[JOBS[j][8]], bias_ptrs[JOBS[j][7]], dbias_ptrs[JOBS[j][7]]),
                program - JOBS[j][0],
                *(JOBS[j][2], JOBS[j][3], JOBS[j][7] > 0, JOBS[j][4] > 0, BLOCK_R, BLOCK_C),
            )


class Shape(NamedTuple):
    """Of a layer, as a key: its irreps, sizes of their weights, and what else there is."""

    lines: int
    weights: tuple[tuple[int, ...], ...]
    biased: bool
    scaled: bool


def stack(layers: Sequence[Sources], dtype: torch.dtype) -> list[Tensor]:
    """Of each layer the matrices [L C' C], [Q' Q] and the bias [C'], scaled, in dtype."""
    shapes = tuple(map(_shape, layers))
    jobs, tiles = stack_jobs(shapes)
    out, sources, first = [], [], layers[0].weights[0]
    for weights, bias, _, lines in layers:
        out.append(weights[0].new_empty((lines, *weights[0].shape), dtype=dtype))
        rest = [*weights[lines:], *([] if bias is None else [bias])]
        out += [part.new_empty(part.shape, dtype=dtype) for part in rest]
        sources += [*weights, *([] if bias is None else [bias])]
    factors = (first, *(factor for layer in layers for factor in layer.factors))
    stack_kernel[(tiles,)](
        *map(_dense, (sources, factors, out)),
        JOBS=jobs,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def unstack(pairs: Sequence[tuple[Matrices, Sources]]) -> list[Tensor]:
    """Gradients of all tensors of each layer, in their order and dtypes."""
    layers = [layer for _, layer in pairs]
    jobs, tiles = unstack_jobs(tuple(map(_shape, layers)))
    grads = [part for own, _ in pairs for part in own if part is not None]
    weights = [weight for layer in layers for weight in layer.weights]
    # What is not there is number 0, and never read or written.
    unread = weights[0]
    biases = [unread, *(layer.bias for layer in layers if layer.bias is not None)]
    factors = [unread, *(factor for layer in layers for factor in layer.factors)]
    d_weights, d_biases, d_factors = (
        [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]
        for parts in (weights, biases[1:], factors[1:])
    )
    unstack_kernel[(tiles,)](
        *map(_dense, (grads, weights, biases, factors)),
        *(tuple(d_weights), (unread, *d_biases), (unread, *d_factors)),
        JOBS=jobs,
        BLOCK_R=BLOCK_R,
        BLOCK_C=BLOCK_C,
        num_warps=4,
        enable_fp_fusion=True,
    )
    of_weights, of_biases, of_factors = map(iter, (d_weights, d_biases, d_factors))
    found = []
    for layer in layers:
        found += [next(of_weights) for _ in layer.weights]
        found += [] if layer.bias is None else [next(of_biases)]
        found += [next(of_factors) for _ in layer.factors]
    return found


def _dense(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def _shape(layer: Sources) -> Shape:
    sizes = tuple(tuple(weight.shape) for weight in layer.weights)
    return Shape(layer.lines, sizes, layer.bias is not None, bool(layer.factors))


@lru_cache(maxsize=256)  # a launch costs the host less
def stack_jobs(layers: tuple[Shape, ...]) -> tuple[tuple[tuple[int, ...], ...], int]:
    """The jobs of `stack_kernel`, and how many tiles they have."""
    jobs, tile, output, factor = [], 0, 0, 0
    for lines, weights, biased, scaled in layers:
        parts = [*weights, *([(weights[0][0], 1)] if biased else [])]
        numbers = [*range(factor + 1, factor + len(weights) + 1), factor + 1]
        for index, (rows, columns) in enumerate(parts):
            tiles, line = ceil_div(rows * columns, BLOCK), index < lines
            place = (output, index * rows * columns) if line else (output + index - lines + 1, 0)
            number = numbers[min(index, len(weights))] if scaled else 0
            jobs.append((tile, tiles, rows * columns, columns, number, *place))
            tile += tiles
        output += len(parts) - lines + 1
        factor += len(weights) if scaled else 0
    return tuple(jobs), tile


@lru_cache(maxsize=256)
def unstack_jobs(layers: tuple[Shape, ...]) -> tuple[tuple[tuple[int, ...], ...], int]:
    """The jobs of `unstack_kernel`, and how many tiles they have."""
    jobs, tile, grad, factor, bias = [], 0, 0, 0, 0
    for lines, weights, biased, scaled in layers:
        grads = 1 + len(weights) - lines + biased
        bias += biased
        for index, (rows, columns) in enumerate(weights):
            tiles, line = ceil_div(rows, BLOCK_R), index < lines
            place = (grad, index * rows * columns) if line else (grad + index - lines + 1, 0)
            beside = (bias, grad + grads - 1) if biased and index == 0 else (0, grad)
            number = factor + index + 1 if scaled else 0
            jobs.append((tile, tiles, rows, columns, number, *place, *beside))
            tile += tiles
        grad += grads
        factor += len(weights) if scaled else 0
    return tuple(jobs), tile
