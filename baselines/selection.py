"""Which tokens are important, how many stay, and taking them: shared by methods that drop tokens.

Letters in shapes: B images, T tokens, M of them taken, P prefix tokens in front of n others, k of
these kept, H heads, d channels of a head, D channels.
"""

import math

import torch
from torch import Tensor

from utils.precision import at_least_float32
from utils.ranges import check_rate


def keep_count(rate: float, count: int, *, exact: bool = True) -> int:
    """ceil(rate * count), at least 1.

    exact: a product within 1e-9 of a whole number counts as that number.
    Otherwise as published, where 0.55 of 100 tokens are 56 because of a rounding error.
    """
    check_rate("keep_rate", rate)
    count = int(count)  # a tensor where a tracer follows shapes, and rounded to float32 there
    return max(1, math.ceil(round(rate * count, 9) if exact else rate * count))


def class_attention(q: Tensor, k: Tensor) -> Tensor:
    """Attention of token 0 to all, the mean over heads: [B T] of q, k [B H T d].

    The softmax is taken in float32 at least. Departs from EViT: attention dropout does not affect
    it.
    """
    scores = (q[:, :, :1] * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return at_least_float32(scores).softmax(dim=-1).mean(dim=1).squeeze(1)


def most_important(importance: Tensor, count: int) -> Tensor:
    """Indices [B k] of the most important of n tokens [B n], the most important first."""
    return importance.topk(count, dim=1, largest=True, sorted=True).indices


def keep_tokens(
    x: Tensor, kept: Tensor, importance: Tensor, *, num_prefix: int, fuse: bool
) -> Tensor:
    """Tokens [B P+k(+1) D] of x [B P+n D]: prefix tokens, kept ones in their order, the fused one.

    The fused token is the sum of the others, weighted by their importance [B n] (which sums to less
    than 1, so it is smaller than its parts). Of tokens in float32 it stays exact under autocast.
    """
    prefix, others = x[:, :num_prefix], x[:, num_prefix:]
    parts = [prefix, rows_of(others, kept)]
    if fuse:
        weights = importance.scatter(1, kept, 0.0).to(x.dtype)
        parts.append((others * weights[..., None]).sum(dim=1, keepdim=True))
    return torch.cat(parts, dim=1)


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """Rows index [B M] of x [B T D]: [B M D]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
