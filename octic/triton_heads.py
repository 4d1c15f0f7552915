"""Triton kernels of `octic.heads`: channels by irrep to channels by head, and back, in one pass.

A program owns a tile of tokens and of neighbouring channels of what it writes, and gathers them;
where a channel comes from is worked out once for all its tokens. Imported only when a CUDA tensor
needs them.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from octic.triton_tiles import ceil_div, tile_width

TILE = 2048  # tokens x channels
ROUNDS = 2  # tiles of a program
MAX_PARTS = 3  # queries, keys, values


@triton.jit
def _tokens(start, rows, BLOCK_R: tl.constexpr):
    token = start * BLOCK_R + tl.arange(0, BLOCK_R)
    return token.to(tl.int64)[:, None], (token < rows)[:, None]


@triton.jit(do_not_specialize=["rows"])
def split_kernel(
    x_ptr,
    bias_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    rows,
    BIASED: tl.constexpr,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    PLANES: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROUNDS: tl.constexpr,
    RUN: tl.constexpr,
):
    HEAD: tl.constexpr = LINES * LINE + PLANES * PLANE
    ACROSS: tl.constexpr = (HEADS * HEAD + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    part = program // ACROSS % PARTS
    column = program % ACROSS * BLOCK_C + tl.arange(0, BLOCK_C)
    head, inner = column // HEAD, column % HEAD
    source = ((inner // LINE) * PARTS + part) * (HEADS * LINE) + head * LINE + inner % LINE
    if PLANES > 0:
        rest = inner - LINES * LINE
        in_planes = ((rest // PLANE) * PARTS + part) * (HEADS * PLANE) + head * PLANE + rest % PLANE
        source = tl.where(rest < 0, source, LINES * PARTS * HEADS * LINE + in_planes)
    source = tl.max_contiguous(tl.multiple_of(source, RUN), RUN)
    if BIASED > 0:
        inside = (source < BIASED) & (column < HEADS * HEAD)
        bias = tl.load(bias_ptr + source, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(ROUNDS):
        token, valid = _tokens(program // (ACROSS * PARTS) * ROUNDS + k, rows, BLOCK_R)
        mask = valid & (column < HEADS * HEAD)[None, :]
        value = tl.load(x_ptr + token * (PARTS * HEADS * HEAD) + source[None, :], mask=mask)
        if BIASED > 0:
            value = (value.to(tl.float32) + bias[None, :]).to(x_ptr.dtype.element_ty)
        offsets = token * (HEADS * HEAD) + column[None, :]
        # One store in each branch: a pointer that is chosen at run time is not known to be aligned.
        if part == 0:
            tl.store(first_ptr + offsets, value, mask=mask)
        elif part == 1:
            tl.store(second_ptr + offsets, value, mask=mask)
        else:
            tl.store(third_ptr + offsets, value, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def join_kernel(
    first_ptr,
    second_ptr,
    third_ptr,
    y_ptr,
    rows,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    PLANES: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROUNDS: tl.constexpr,
    RUN: tl.constexpr,
):
    HEAD: tl.constexpr = LINES * LINE + PLANES * PLANE
    ACROSS: tl.constexpr = (PARTS * HEADS * HEAD + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    column = program % ACROSS * BLOCK_C + tl.arange(0, BLOCK_C)
    index = column // LINE  # of (row, part, head)
    head, part = index % HEADS, index // HEADS % PARTS
    inner = index // (PARTS * HEADS) * LINE + column % LINE
    if PLANES > 0:
        rest = column - LINES * PARTS * HEADS * LINE
        index = rest // PLANE
        head = tl.where(rest < 0, head, index % HEADS)
        part = tl.where(rest < 0, part, index // HEADS % PARTS)
        in_planes = LINES * LINE + index // (PARTS * HEADS) * PLANE + rest % PLANE
        inner = tl.where(rest < 0, inner, in_planes)
    source = tl.max_contiguous(tl.multiple_of(head * HEAD + inner, RUN), RUN)
    for k in tl.static_range(ROUNDS):
        token, valid = _tokens(program // ACROSS * ROUNDS + k, rows, BLOCK_R)
        mask = valid & (column < PARTS * HEADS * HEAD)[None, :]
        offsets = token * (HEADS * HEAD) + source[None, :]
        value = tl.load(first_ptr + offsets, mask=mask & (part == 0)[None, :], other=0.0)
        if PARTS > 1:
            second = tl.load(second_ptr + offsets, mask=mask & (part == 1)[None, :], other=0.0)
            value = tl.where((part == 1)[None, :], second, value)
        if PARTS > 2:
            third = tl.load(third_ptr + offsets, mask=mask & (part == 2)[None, :], other=0.0)
            value = tl.where((part == 2)[None, :], third, value)
        tl.store(
            y_ptr + token * (PARTS * HEADS * HEAD) + column[None, :],
            value.to(y_ptr.dtype.element_ty),
            mask=mask,
        )


def split(
    x: Tensor, bias: Tensor | None, heads: int, widths: Sequence[int], parts: int
) -> list[Tensor]:
    """Features [B T parts*D], contiguous, to `parts` tensors of heads [B T H D/H].

    bias: added to as many of the first channels as it has.
    """
    head = sum(widths)
    out = [x.new_empty(*x.shape[:-1], heads, head) for _ in range(parts)]
    arguments = options(heads, tuple(widths), parts, heads * head)
    read = (x, x if bias is None else bias.contiguous())
    arguments = arguments | {"BIASED": 0 if bias is None else len(bias)}
    _launch(split_kernel, (*read, *_three(out)), out[0].numel(), arguments, parts)
    return out


def join(tensors: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
    """Contiguous tensors of heads [B T H D/H] to features [B T parts*D]."""
    first, parts = tensors[0], len(tensors)
    heads, width = first.shape[-2], parts * first.shape[-2] * first.shape[-1]
    y = first.new_empty(*first.shape[:-2], width)
    arguments = options(heads, tuple(widths), parts, width)
    _launch(join_kernel, (*_three(tensors), y), first.numel(), arguments, 1)
    return y


def _three(tensors: Sequence[Tensor]) -> list[Tensor]:
    # A kernel argument that is not used still has to be a tensor.
    return [*tensors, *[tensors[-1]] * (MAX_PARTS - len(tensors))]


@lru_cache(maxsize=256)  # a launch costs the host less
def options(heads: int, widths: tuple[int, ...], parts: int, columns: int) -> dict[str, Any]:
    """Compile-time arguments; widths of a head's rows: equal lines, then equal rows of planes."""
    lines = next((k for k, width in enumerate(widths) if width != widths[0]), len(widths))
    block = tile_width(columns, 64, 256)
    return {
        "PARTS": parts,
        "HEADS": heads,
        "LINES": lines,
        "LINE": widths[0],
        "PLANES": len(widths) - lines,
        "PLANE": widths[-1],
        "BLOCK_R": TILE // block,
        "BLOCK_C": block,
        "ROUNDS": ROUNDS,
        # So many channels stay neighbours, from a multiple of this on: the width of a load.
        "RUN": min(8, *(width & -width for width in widths)),
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def _launch(kernel: Any, tensors: tuple, values: int, arguments: dict, written: int) -> None:
    """values: those of a tensor of heads; written: tensors that the kernel writes."""
    if not values:
        return
    head = arguments["LINES"] * arguments["LINE"] + arguments["PLANES"] * arguments["PLANE"]
    width = arguments["HEADS"] * head
    rows = values // width
    across = ceil_div(arguments["PARTS"] * width // written, arguments["BLOCK_C"])
    rounds = ceil_div(rows, arguments["BLOCK_R"] * arguments["ROUNDS"])
    # The other dimensions of a CUDA grid end at 65,535.
    kernel[(across * written * rounds,)](*tensors, rows, **arguments)
