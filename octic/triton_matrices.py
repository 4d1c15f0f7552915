"""Triton kernels of `octic.matrices`: the matrices of all irreps made ready in one launch.

Torch takes a kernel each to stack, to scale and to cast, forward and backward: some thirty a block,
each shorter than its launch. Imported only when a CUDA tensor needs them.
"""

# Arguments of a Triton function have no Python types.
# ruff: noqa: ANN001, ANN201, ANN202, D103
# mypy: disable-error-code="assignment, attr-defined"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from octic.operators import ceil_div

MAX_LINES = 4  # one-dimensional irreps of a group
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
def stack_kernel(
    first_ptr,
    second_ptr,
    third_ptr,
    fourth_ptr,
    last_ptr,
    first_factor_ptr,
    second_factor_ptr,
    third_factor_ptr,
    fourth_factor_ptr,
    last_factor_ptr,
    bias_ptr,
    lines_out_ptr,
    plane_out_ptr,
    bias_out_ptr,
    LINES: tl.constexpr,
    LINE_ROWS: tl.constexpr,
    LINE_COLUMNS: tl.constexpr,
    PLANE_ROWS: tl.constexpr,
    PLANE_COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    VALUES: tl.constexpr = LINE_ROWS * LINE_COLUMNS
    PLANE_VALUES: tl.constexpr = PLANE_ROWS * PLANE_COLUMNS
    TILES: tl.constexpr = (VALUES + BLOCK - 1) // BLOCK
    PLANE_TILES: tl.constexpr = (PLANE_VALUES + BLOCK - 1) // BLOCK
    line, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    out_ptr = lines_out_ptr + line * VALUES
    rest = tl.program_id(0) - LINES * TILES
    if line == 0:
        _scaled_copy(
            *(first_ptr, first_factor_ptr, out_ptr, tile), *(VALUES, LINE_COLUMNS, SCALED, BLOCK)
        )
    elif line == 1 and LINES > 1:
        _scaled_copy(
            *(second_ptr, second_factor_ptr, out_ptr, tile), *(VALUES, LINE_COLUMNS, SCALED, BLOCK)
        )
    elif line == 2 and LINES > 2:
        _scaled_copy(
            *(third_ptr, third_factor_ptr, out_ptr, tile), *(VALUES, LINE_COLUMNS, SCALED, BLOCK)
        )
    elif line == 3 and LINES > 3:
        _scaled_copy(
            *(fourth_ptr, fourth_factor_ptr, out_ptr, tile), *(VALUES, LINE_COLUMNS, SCALED, BLOCK)
        )
    elif rest < PLANE_TILES:
        _scaled_copy(
            *(last_ptr, last_factor_ptr, plane_out_ptr, rest),
            *(PLANE_VALUES, PLANE_COLUMNS, SCALED, BLOCK),
        )
    elif BIAS:
        _scaled_copy(
            *(bias_ptr, first_factor_ptr, bias_out_ptr, rest - PLANE_TILES),
            *(LINE_ROWS, 1, SCALED, BLOCK),
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
    grad_lines_ptr,
    grad_plane_ptr,
    grad_bias_ptr,
    bias_ptr,
    dbias_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    fourth_ptr,
    last_ptr,
    first_factor_ptr,
    second_factor_ptr,
    third_factor_ptr,
    fourth_factor_ptr,
    last_factor_ptr,
    first_out_ptr,
    second_out_ptr,
    third_out_ptr,
    fourth_out_ptr,
    last_out_ptr,
    first_dfactor_ptr,
    second_dfactor_ptr,
    third_dfactor_ptr,
    fourth_dfactor_ptr,
    last_dfactor_ptr,
    LINES: tl.constexpr,
    LINE_ROWS: tl.constexpr,
    LINE_COLUMNS: tl.constexpr,
    PLANE_ROWS: tl.constexpr,
    PLANE_COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    TILES: tl.constexpr = (LINE_ROWS + BLOCK_R - 1) // BLOCK_R
    line, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    grad_ptr = grad_lines_ptr + line * (LINE_ROWS * LINE_COLUMNS)
    if line == 0:
        _unscaled_rows(
            *(grad_ptr, first_ptr, first_factor_ptr, first_out_ptr, first_dfactor_ptr),
            *(grad_bias_ptr, bias_ptr, dbias_ptr, tile),
            *(LINE_ROWS, LINE_COLUMNS, BIAS, SCALED, BLOCK_R, BLOCK_C),
        )
    elif line == 1 and LINES > 1:
        _unscaled_rows(
            *(grad_ptr, second_ptr, second_factor_ptr, second_out_ptr, second_dfactor_ptr),
            *(grad_bias_ptr, bias_ptr, dbias_ptr, tile),
            *(LINE_ROWS, LINE_COLUMNS, False, SCALED, BLOCK_R, BLOCK_C),
        )
    elif line == 2 and LINES > 2:
        _unscaled_rows(
            *(grad_ptr, third_ptr, third_factor_ptr, third_out_ptr, third_dfactor_ptr),
            *(grad_bias_ptr, bias_ptr, dbias_ptr, tile),
            *(LINE_ROWS, LINE_COLUMNS, False, SCALED, BLOCK_R, BLOCK_C),
        )
    elif line == 3 and LINES > 3:
        _unscaled_rows(
            *(grad_ptr, fourth_ptr, fourth_factor_ptr, fourth_out_ptr, fourth_dfactor_ptr),
            *(grad_bias_ptr, bias_ptr, dbias_ptr, tile),
            *(LINE_ROWS, LINE_COLUMNS, False, SCALED, BLOCK_R, BLOCK_C),
        )
    else:
        _unscaled_rows(
            *(grad_plane_ptr, last_ptr, last_factor_ptr, last_out_ptr, last_dfactor_ptr),
            *(grad_bias_ptr, bias_ptr, dbias_ptr, tl.program_id(0) - LINES * TILES),
            *(PLANE_ROWS, PLANE_COLUMNS, False, SCALED, BLOCK_R, BLOCK_C),
        )


def stack(
    weights: Sequence[Tensor],
    bias: Tensor | None,
    factors: Sequence[Tensor],
    lines: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices [L C' C] and [Q' Q] and the bias [C'], scaled, in dtype; what is absent is empty."""
    first = weights[0]
    stacked = first.new_empty(lines, *first.shape, dtype=dtype)
    plane = first.new_empty(weights[lines].shape if len(weights) > lines else (0,), dtype=dtype)
    out_bias = first.new_empty(0 if bias is None else len(bias), dtype=dtype)
    sizes = _sizes(weights, bias, factors, lines)
    tiles = lines * ceil_div(first.numel(), BLOCK) + ceil_div(plane.numel(), BLOCK)
    stack_kernel[(tiles + ceil_div(out_bias.numel(), BLOCK),)](
        *_five(weights, lines, first),
        *_five(factors, lines, first),
        *(first if bias is None else bias, stacked, plane, out_bias),
        **sizes,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return stacked, plane, out_bias


def unstack(
    grad_lines: Tensor,
    grad_plane: Tensor,
    grad_bias: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    factors: Sequence[Tensor],
    lines: int,
) -> list[Tensor]:
    """Gradients of the weights, then of the factors, then of the bias, in their dtypes."""
    first = weights[0]
    d_weights = [torch.empty_like(weight) for weight in weights]
    d_factors = [torch.empty_like(factor) for factor in factors]
    d_bias = None if bias is None else torch.empty_like(bias)
    tiles = lines * ceil_div(first.shape[0], BLOCK_R)
    tiles += ceil_div(weights[lines].shape[0], BLOCK_R) if len(weights) > lines else 0
    unstack_kernel[(tiles,)](
        *(grad_lines, grad_plane, grad_bias),
        *(first if bias is None else bias, first if d_bias is None else d_bias),
        *_five(weights, lines, first),
        *_five(factors, lines, first),
        *_five(d_weights, lines, first),
        *_five(d_factors, lines, first),
        **_sizes(weights, bias, factors, lines),
        BLOCK_R=BLOCK_R,
        BLOCK_C=BLOCK_C,
        num_warps=4,
    )
    return [*d_weights, *d_factors, *([] if d_bias is None else [d_bias])]


def _five(tensors: Sequence[Tensor], lines: int, other: Tensor) -> list[Tensor]:
    """Those of four lines and of the plane; `other` stands for what a kernel does not read."""
    of_lines, rest = list(tensors[:lines]), tensors[lines:]
    return [*of_lines, *[other] * (MAX_LINES - len(of_lines)), rest[0] if rest else other]


def _sizes(
    weights: Sequence[Tensor], bias: Tensor | None, factors: Sequence[Tensor], lines: int
) -> dict[str, int | bool]:
    plane = tuple(weights[lines].shape) if len(weights) > lines else (0, 0)
    return {
        "LINES": lines,
        "LINE_ROWS": weights[0].shape[0],
        "LINE_COLUMNS": weights[0].shape[1],
        "PLANE_ROWS": plane[0],
        "PLANE_COLUMNS": plane[1],
        "BIAS": bias is not None,
        "SCALED": bool(factors),
    }
