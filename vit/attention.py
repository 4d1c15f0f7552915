"""Softmax attention over a batch of equal sequences or over a packed one.

Letters in shapes: B sequences, T tokens, H heads, K channels of a head, D = H K.
"""

import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit.packing import Packing, unpack

BACKENDS = ("auto", "sdpa", "varlen", "xformers")
WIDEST_HEAD = 256  # channels that the variable-length kernel takes, in multiples of 8


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing | None = None,
    *,
    backend: str = "auto",
    dropout: float = 0.0,
) -> Tensor:
    """Attention of q, k, v [B T H K] (packed: B = 1); returns [B T H K].

    On a packed input each sequence attends to itself alone, by one of three equal ways: `varlen`
    (torch's variable-length kernel: CUDA from Ampere on, half precision, K a multiple of 8 up to
    256), `xformers` (its block-diagonal mask), or `sdpa` (one call per group of equal lengths, any
    device). `auto` takes the first that the tensors allow of varlen and sdpa. ValueError where they
    do not allow `varlen`.
    """
    if packing is None:
        return _sdpa(q, k, v, dropout)
    if backend == "auto":
        backend = "varlen" if _takes_varlen(q) and dropout == 0.0 else "sdpa"
    if backend == "varlen":
        return _varlen(q, k, v, packing, dropout)
    if backend == "xformers":
        return _xformers(q, k, v, packing, dropout)
    parts = [
        _sdpa(q_group, k_group, v_group, dropout).flatten(0, 1)
        for q_group, k_group, v_group in zip(
            *(unpack(x, packing.groups) for x in (q, k, v)), strict=True
        )
    ]
    return torch.cat(parts).unsqueeze(0)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B H T K]
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2)


def _takes_varlen(q: Tensor) -> bool:
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    width = q.shape[-1]
    return width % 8 == 0 and width <= WIDEST_HEAD and _has_flash_attention(q.device)


@torch.compiler.assume_constant_result  # a compiler asks the device, which it cannot trace
def _has_flash_attention(device: torch.device) -> bool:
    return _capability(device) >= (8, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)  # too slow to be asked in every block


def _varlen(q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ValueError(
            f'attention backend "varlen" has no dropout, and {dropout} is asked for; '
            'backend "auto" takes one that has'
        )
    if not _takes_varlen(q):
        raise ValueError(
            f'attention backend "varlen" needs CUDA (Ampere or newer), half precision and heads of '
            f"8, 16, ... {WIDEST_HEAD} channels, not {q.device.type}, {q.dtype} and {q.shape[-1]}; "
            'backend "auto" takes what the tensors allow'
        )
    longest, offsets = packing.longest, packing.offsets
    q, k, v = (x.squeeze(0) for x in (q, k, v))
    out = varlen_attn(q, k, v, offsets, offsets, longest, longest)
    assert isinstance(out, Tensor)  # a pair only where auxiliary results are asked for
    return out.unsqueeze(0)


def _xformers(q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float) -> Tensor:
    try:
        from xformers.ops import fmha
    except ImportError as error:
        raise ValueError(
            'attention backend "xformers" needs the package xformers (pip install xformers); '
            'backend "auto" needs nothing'
        ) from error
    lengths = [tokens for count, tokens in packing.groups for _ in range(count)]
    mask = fmha.BlockDiagonalMask.from_seqlens(lengths)
    return fmha.memory_efficient_attention(q, k, v, attn_bias=mask, p=dropout)


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values.

    qk_scale: factor of the logits; None is (D / H)^-1/2.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        qk_scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_backend(backend)
        check_dropout(attn_drop)
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qk_scale = qk_scale
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """Attend within each sequence; x and the result are [B T D]."""
        return self.attended(*self.queries_keys_values(x), packing)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing | None = None) -> Tensor:
        """Attention of q, k, v [B T H K], projected: [B T D]."""
        dropout = self.attn_drop if self.training else 0.0
        out = attend(q, k, v, packing, backend=self.backend, dropout=dropout)
        return self.proj(out.flatten(2))

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three times [B T H K] of tokens [B T D], for logits q k / sqrt(K)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        if self.qk_scale is not None:
            q = q * (self.qk_scale * math.sqrt(q.shape[-1]))  # beside attention's own scale
        return q, k, v


def check_heads(dim: int, num_heads: int) -> None:
    """Refuse a width that the heads do not divide."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"embed_dim {dim} is not divisible by num_heads {num_heads}")


def check_dropout(attn_drop: float) -> None:
    """Refuse a share of attention weights to drop that is none: training alone would find out."""
    if not 0 <= attn_drop <= 1:
        raise ValueError(f"attn_drop {attn_drop} is not in [0, 1]")


def check_backend(backend: str) -> None:
    """Refuse an unknown attention backend."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; known: {', '.join(BACKENDS)}")
