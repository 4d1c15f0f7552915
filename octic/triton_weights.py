"""Triton kernels of the weights' gradients of `octic.irrep_linear`: all matrices, and the bias.

These products are small matrices summed over all tokens, so tokens are dealt out: a program sums a
tile of one matrix over its share of them, in float32, and a second kernel adds the shares in a
fixed order (no atomics: the same bits every time). Imported only when a CUDA tensor needs them.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octic.device import processors
from octic.precision import float32_products
from octic.triton_tiles import ceil_div

BLOCK_M = 64  # tokens at a time
# Programs for each streaming multiprocessor; more are better balanced, and write more sums.
PROGRAMS = 3


@triton.jit
def _write_tile(
    grad_ptr,
    x_ptr,
    sums_ptr,
    start,
    end,
    row,
    column,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    TIMES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A tile of grad^T x over tokens start to end: columns of grad [M OUT] by those of x [M IN].

    The matrix is [N K]; its columns stand TIMES side by side, for as many rows of an irrep.
    """
    total = tl.zeros((row.shape[0], column.shape[0]), dtype=tl.float32)
    inside = (row < N)[None, :], (column < K)[None, :]
    for k in tl.static_range(TIMES):
        for first in range(start, end, BLOCK_M):
            token = first + tl.arange(0, BLOCK_M)
            valid = (token < end)[:, None]
            token = token.to(tl.int64)[:, None]
            grad_offsets = token * OUT + (row + k * N)[None, :]
            x_offsets = token * IN + (column + k * K)[None, :]
            grad = tl.load(grad_ptr + grad_offsets, mask=valid & inside[0], other=0.0)
            x = tl.load(x_ptr + x_offsets, mask=valid & inside[1], other=0.0)
            total = tl.dot(tl.trans(grad), x, total, input_precision=PRECISION)
    mask = (row < N)[:, None] & (column < K)[None, :]
    tl.store(sums_ptr + row[:, None] * K + column[None, :], total, mask=mask)


@triton.jit
def _write_column_sums(
    grad_ptr, sums_ptr, start, end, row, OUT: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr
):
    total = tl.zeros((BLOCK_M, row.shape[0]), dtype=tl.float32)
    for first in range(start, end, BLOCK_M):
        token = first + tl.arange(0, BLOCK_M)
        mask = (token < end)[:, None] & (row < N)[None, :]
        offsets = token.to(tl.int64)[:, None] * OUT + row[None, :]
        total += tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(sums_ptr + row, tl.sum(total, axis=0), mask=row < N)


@triton.jit(do_not_specialize=["rows", "span"])
def share_kernel(
    grad_ptr,
    x_ptr,
    sums_ptr,
    rows,
    span,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    LINES: tl.constexpr,
    LINE_IN: tl.constexpr,
    LINE_OUT: tl.constexpr,
    PLANES: tl.constexpr,
    PLANE_IN: tl.constexpr,
    PLANE_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LINE_I: tl.constexpr,
    LINE_J: tl.constexpr,
    PLANE_I: tl.constexpr,
    PLANE_J: tl.constexpr,
):
    """One share of the sums: the rows of planes first, as they take longest, then lines, bias."""
    ACROSS: tl.constexpr = (PLANE_IN + PLANE_J - 1) // PLANE_J
    PLANE_TILES: tl.constexpr = (PLANE_OUT + PLANE_I - 1) // PLANE_I * ACROSS * (PLANES > 0)
    LINE_ACROSS: tl.constexpr = (LINE_IN + LINE_J - 1) // LINE_J
    TILES: tl.constexpr = (LINE_OUT + LINE_I - 1) // LINE_I * LINE_ACROSS
    WIDTH: tl.constexpr = LINES * LINE_OUT * LINE_IN + PLANE_OUT * PLANE_IN * (PLANES > 0)
    start = tl.program_id(1) * span
    end = tl.minimum(start + span, rows)
    sums_ptr += tl.program_id(1).to(tl.int64) * (WIDTH + LINE_OUT)
    tile = tl.program_id(0)
    if tile < PLANE_TILES:
        _write_tile(
            grad_ptr + LINES * LINE_OUT,
            x_ptr + LINES * LINE_IN,
            sums_ptr + LINES * LINE_OUT * LINE_IN,
            start,
            end,
            tile // ACROSS * PLANE_I + tl.arange(0, PLANE_I),
            tile % ACROSS * PLANE_J + tl.arange(0, PLANE_J),
            *(IN, OUT, PLANE_IN, PLANE_OUT, PLANES, PRECISION, BLOCK_M),
        )
    elif tile < PLANE_TILES + LINES * TILES:
        line = (tile - PLANE_TILES) // TILES
        of_line = (tile - PLANE_TILES) % TILES
        _write_tile(
            grad_ptr + line * LINE_OUT,
            x_ptr + line * LINE_IN,
            sums_ptr + line * (LINE_OUT * LINE_IN),
            start,
            end,
            of_line // LINE_ACROSS * LINE_I + tl.arange(0, LINE_I),
            of_line % LINE_ACROSS * LINE_J + tl.arange(0, LINE_J),
            *(IN, OUT, LINE_IN, LINE_OUT, 1, PRECISION, BLOCK_M),
        )
    else:
        row = (tile - PLANE_TILES - LINES * TILES) * LINE_I + tl.arange(0, LINE_I)
        _write_column_sums(grad_ptr, sums_ptr + WIDTH, start, end, row, OUT, LINE_OUT, BLOCK_M)


@triton.jit(do_not_specialize=["shares"])
def add_kernel(
    sums_ptr,
    lines_ptr,
    plane_ptr,
    bias_ptr,
    shares,
    LINE_VALUES: tl.constexpr,
    PLANE_VALUES: tl.constexpr,
    BIAS_VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    WIDTH: tl.constexpr = LINE_VALUES + PLANE_VALUES + BIAS_VALUES
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for share in range(shares):
        total += tl.load(sums_ptr + share * WIDTH + index, mask=index < WIDTH, other=0.0)
    total = total.to(lines_ptr.dtype.element_ty)
    tl.store(lines_ptr + index, total, mask=index < LINE_VALUES)
    in_plane = index - LINE_VALUES
    mask = (in_plane >= 0) & (in_plane < PLANE_VALUES)
    tl.store(plane_ptr + in_plane, total, mask=mask)
    in_bias = in_plane - PLANE_VALUES
    tl.store(bias_ptr + in_bias, total, mask=(in_bias >= 0) & (in_bias < BIAS_VALUES))


def backward(
    grad: Tensor, x: Tensor, lines: Tensor, plane: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of lines [L C' C], plane [Q' Q] (without one: empty) and bias [C'].

    grad [M L C' + R Q'] and x [M L C + R Q].
    """
    count, wanted, given = lines.shape
    shape = None if plane is None else tuple(plane.shape)
    planes = 0 if plane is None else (x.shape[1] - count * given) // plane.shape[1]
    tile, tiles = options(tuple(lines.shape), shape, planes, half=x.dtype.itemsize == 2)
    d_lines = lines.new_empty(lines.shape, dtype=x.dtype)
    d_plane = x.new_empty(0) if plane is None else plane.new_empty(plane.shape, dtype=x.dtype)
    d_bias = x.new_empty(wanted)
    span, shares = _shares(len(x), tiles, x.device)
    values = d_lines.numel(), d_plane.numel(), wanted
    sums = x.new_empty(shares, sum(values), dtype=torch.float32)
    share_kernel[(tiles, shares)](
        *(grad.contiguous(), x.contiguous(), sums, len(x), span),
        PRECISION=float32_products(),
        **tile,
    )
    names = ("LINE_VALUES", "PLANE_VALUES", "BIAS_VALUES")
    sizes = dict(zip(names, values, strict=True))
    add_kernel[(ceil_div(sum(values), 512),)](
        *(sums, d_lines, d_plane, d_bias, shares),
        **sizes,
        BLOCK=512,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return d_lines, d_plane, d_bias


@lru_cache(maxsize=256)  # a launch costs the host less
def options(
    lines: tuple, plane: tuple | None, planes: int, *, half: bool
) -> tuple[dict[str, Any], int]:
    """Compile-time arguments for matrices of these shapes, and the number of tiles.

    half: numbers of two bytes. Wider ones take tiles and stages that need as much memory.
    """
    count, line_out, line_in = lines
    plane_out, plane_in = plane or (1, 1)
    blocks = {
        "LINE_I": _block(line_out, half),
        "LINE_J": _block(line_in, half),
        "PLANE_I": _block(plane_out, half),
        "PLANE_J": _block(plane_in, half),
    }
    rows = ceil_div(line_out, blocks["LINE_I"])
    tiles = count * rows * ceil_div(line_in, blocks["LINE_J"]) + rows
    if planes:
        tiles += ceil_div(plane_out, blocks["PLANE_I"]) * ceil_div(plane_in, blocks["PLANE_J"])
    arguments = {
        "IN": count * line_in + planes * plane_in,
        "OUT": count * line_out + planes * plane_out,
        "LINES": count,
        "LINE_IN": line_in,
        "LINE_OUT": line_out,
        "PLANES": planes,
        "PLANE_IN": plane_in,
        "PLANE_OUT": plane_out,
        "BLOCK_M": BLOCK_M,
        "num_warps": 4,
        "enable_fp_fusion": True,
        "num_stages": 3 if half else 2,
    }
    return arguments | blocks, tiles


def _block(width: int, half: bool) -> int:
    return 128 if half and width % 128 == 0 else 64  # the larger one only where it pads nothing


def _shares(rows: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """Tokens of a share, a multiple of a block's, and how many shares there are."""
    wanted = max(1, round(PROGRAMS * processors(device) / tiles))
    span = ceil_div(ceil_div(max(rows, 1), wanted), BLOCK_M) * BLOCK_M
    return span, ceil_div(max(rows, 1), span)
