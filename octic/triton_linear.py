"""Triton kernel of `octic.irrep_linear`: the products of all irreps, and the bias, in one launch.

A program owns a tile of tokens and of the output channels of one row of one irrep, and sums over
that row's inputs in float32; the result is rounded once. The gradient of the input is the same
kernel with the matrices read the other way. Tiles depend on the widths alone: no autotuning.
Imported only when a CUDA tensor needs it.
"""

from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from octic.precision import float32_products
from octic.triton_tiles import ceil_div

BLOCK_M = 128  # tokens of a program


@triton.jit
def _write_tile(
    x_ptr,
    matrix_ptr,
    bias_ptr,
    y_ptr,
    token,
    rows,
    column,
    biased,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Columns of x [M IN] from x_ptr on, K of them, times a matrix [N K] (TRANSPOSED: [K N]).

    The first `biased` columns of the result get a bias.
    """
    valid, inside = (token < rows)[:, None], (column < N)[None, :]
    total = tl.zeros((token.shape[0], column.shape[0]), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x_offsets = token[:, None] * IN + inner[None, :]
        x = tl.load(x_ptr + x_offsets, mask=valid & (inner < K)[None, :], other=0.0)
        if TRANSPOSED:
            offsets = inner[:, None] * N + column[None, :]
        else:
            offsets = column[None, :] * K + inner[:, None]
        matrix = tl.load(matrix_ptr + offsets, mask=(inner < K)[:, None] & inside, other=0.0)
        total = tl.dot(x, matrix, total, input_precision=PRECISION)
    if BIAS:
        bias = tl.load(bias_ptr + column, mask=column < biased, other=0.0)
        total += bias.to(tl.float32)[None, :]
    y_offsets = token[:, None] * OUT + column[None, :]
    tl.store(y_ptr + y_offsets, total.to(y_ptr.dtype.element_ty), mask=valid & inside)


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    x_ptr,
    lines_ptr,
    plane_ptr,
    bias_ptr,
    y_ptr,
    rows,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    LINES: tl.constexpr,
    LINE_IN: tl.constexpr,
    LINE_OUT: tl.constexpr,
    PLANES: tl.constexpr,
    PLANE_IN: tl.constexpr,
    PLANE_OUT: tl.constexpr,
    BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TILES: tl.constexpr = (LINE_OUT + BLOCK_N - 1) // BLOCK_N
    PLANE_TILES: tl.constexpr = (PLANE_OUT + BLOCK_N - 1) // BLOCK_N
    ACROSS: tl.constexpr = LINES * TILES + PLANES * PLANE_TILES
    tile = tl.program_id(0) % ACROSS
    token = (tl.program_id(0) // ACROSS).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tile < LINES * TILES:
        line = tile // TILES
        _write_tile(
            x_ptr + line * LINE_IN,
            lines_ptr + line * (LINE_IN * LINE_OUT),
            bias_ptr,
            y_ptr + line * LINE_OUT,
            token,
            rows,
            (tile % TILES) * BLOCK_N + tl.arange(0, BLOCK_N),
            tl.where(line == 0, LINE_OUT, 0),
            *(IN, OUT, LINE_IN, LINE_OUT, BIAS, TRANSPOSED, PRECISION, BLOCK_K),
        )
    else:
        row = (tile - LINES * TILES) // PLANE_TILES
        _write_tile(
            x_ptr + LINES * LINE_IN + row * PLANE_IN,
            plane_ptr,
            bias_ptr,
            y_ptr + LINES * LINE_OUT + row * PLANE_OUT,
            token,
            rows,
            ((tile - LINES * TILES) % PLANE_TILES) * BLOCK_N + tl.arange(0, BLOCK_N),
            0,
            *(IN, OUT, PLANE_IN, PLANE_OUT, False, TRANSPOSED, PRECISION, BLOCK_K),
        )


def forward(x: Tensor, lines: Tensor, plane: Tensor | None, bias: Tensor | None) -> Tensor:
    """Features [M L C + R Q] to [M L C' + R Q'] by lines [L C' C], plane [Q' Q], bias [C']."""
    return _launch(x, lines, plane, bias, transposed=False)


def backward_input(grad: Tensor, lines: Tensor, plane: Tensor | None) -> Tensor:
    """Gradient of the features, from that of the result [M L C' + R Q']."""
    return _launch(grad, lines, plane, None, transposed=True)


@lru_cache(maxsize=256)  # a launch costs the host less
def options(
    lines: tuple, plane: tuple | None, rows: int, *, transposed: bool, half: bool
) -> dict[str, Any]:
    """Compile-time arguments for matrices of these shapes, `rows` of them two-dimensional.

    half: numbers of two bytes. Wider ones are taken fewer at a time, as they need more memory.
    """
    given, wanted = (1, 2) if transposed else (2, 1)  # of [L C' C]
    plane_in, plane_out = (1, 1) if plane is None else (plane[given - 1], plane[wanted - 1])
    count, line_in, line_out = lines[0], lines[given], lines[wanted]
    widths = (line_out, plane_out) if rows else (line_out,)
    block_n = 128 if all(width % 128 == 0 for width in widths) else 64
    return {
        "IN": count * line_in + rows * plane_in,
        "OUT": count * line_out + rows * plane_out,
        "LINES": count,
        "LINE_IN": line_in,
        "LINE_OUT": line_out,
        "PLANES": rows,
        "PLANE_IN": plane_in,
        "PLANE_OUT": plane_out,
        "TRANSPOSED": transposed,
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": block_n,
        "BLOCK_K": 64 if half and line_in % 64 == 0 else 32,
        "num_warps": 8 if block_n == 128 else 4,
        "enable_fp_fusion": True,
        "num_stages": 2 if transposed else 3,  # either way at most 128 KiB of a multiprocessor
    }


def _launch(
    x: Tensor, lines: Tensor, plane: Tensor | None, bias: Tensor | None, *, transposed: bool
) -> Tensor:
    given = 1 if transposed else 2
    rest = x.shape[1] - lines.shape[0] * lines.shape[given]
    rows = 0 if plane is None else rest // plane.shape[given - 1]
    shape = None if plane is None else tuple(plane.shape)
    half = x.dtype.itemsize == 2
    arguments = options(tuple(lines.shape), shape, rows, transposed=transposed, half=half)
    y = x.new_empty(len(x), arguments["OUT"])
    if not y.numel():
        return y
    x, lines = x.contiguous(), lines.contiguous()
    plane = lines if plane is None else plane.contiguous()
    block = arguments["BLOCK_N"]
    tiles = arguments["LINES"] * ceil_div(arguments["LINE_OUT"], block)
    tiles += rows * ceil_div(arguments["PLANE_OUT"], block)
    product_kernel[(tiles * ceil_div(len(x), BLOCK_M),)](
        *(x, lines, plane, lines if bias is None else bias.contiguous(), y, len(x)),
        BIAS=bias is not None,
        PRECISION=float32_products(),
        **arguments,
    )
    return y
