"""Triton kernel that adds the bias of `octic.irrep_linear` to the first columns of the products.

Torch's own kernel for a strided part of a matrix reaches an eighth of a GPU's bandwidth. Imported
only when a CUDA tensor needs it.
"""

import triton
import triton.language as tl
from torch import Tensor

from octic.triton_tiles import ceil_div, tile_width

TILE = 2048  # tokens x channels


@triton.jit(do_not_specialize=["rows"])
def add_kernel(
    y_ptr,
    bias_ptr,
    rows,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACROSS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    token = (program // ACROSS).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = program % ACROSS * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets = token[:, None] * WIDTH + channel[None, :]
    mask = (token < rows)[:, None] & (channel < C)[None, :]
    bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    total = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
    tl.store(y_ptr + offsets, total.to(y_ptr.dtype.element_ty), mask=mask)


def add(y: Tensor, bias: Tensor) -> None:
    """Add a bias [C] to the first C columns of a contiguous y [M D], in place."""
    channels = len(bias)
    block = tile_width(channels, 32, 256)
    rows = max(1, TILE // block)
    if not y.numel():
        return
    add_kernel[(ceil_div(channels, block) * ceil_div(len(y), rows),)](
        *(y, bias.contiguous(), len(y)),
        WIDTH=y.shape[1],
        C=channels,
        BLOCK_R=rows,
        BLOCK_C=block,
        num_warps=4,
        enable_fp_fusion=True,
    )
