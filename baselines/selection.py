"""Which tokens are important, how many stay, and taking them: shared by methods that drop tokens.

Letters in shapes: B images, T tokens, M of them taken, H heads, d channels of a head, D channels.
"""

import math

import torch
from torch import Tensor

from utils.ranges import check_range


def keep_count(rate: float, count: int, *, exact: bool = True) -> int:
    """ceil(rate * count), at least 1.

    exact: a product within 1e-9 of a whole number counts as that number.
    Otherwise as published, where 0.55 of 100 tokens are 56 because of a rounding error.
    """
    check_range("keep_rate", rate, 0, 1, ends="(]")
    return max(1, math.ceil(round(rate * count, 9) if exact else rate * count))


def class_attention(q: Tensor, k: Tensor) -> Tensor:
    """Attention of token 0 to all, the mean over heads: [B T] of q, k [B H T d].

    The softmax is taken in float32 at least. Departs from EViT: attention dropout does not affect
    it.
    """
    scores = (q[:, :, :1] * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(dim=-1, dtype=dtype).mean(dim=1).squeeze(1)


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """Rows index [B M] of x [B T D]: [B M D]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
