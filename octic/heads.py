"""Reorder channels before and after attention: grouped by irrep in features, by head in attention.

Every head holds a part of every row of every irrep. `split_heads` and `join_heads` are inverse to
each other, and each is the other's gradient; each is one operator (namespace `octic`) and one pass
over memory. On CUDA a Triton kernel moves the channels (`triton_heads`), elsewhere torch's `cat`.

Letters: B sequences, T tokens, P parts (queries, keys, values: 3; one: 1), H heads, D channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from octic import composed
from octic.device import runs_triton
from octic.operators import launch, multiplies_nothing, operator
from octic.plain_kernels import plain_join, plain_split


def split_heads(
    x: Tensor, heads: int, widths: Sequence[int], parts: int, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Features [B T P*D] to P tensors of heads [B T H D/H].

    widths: channels of one head in each row of each irrep, D/H in sum. x is ordered by row, within
    a row by part, within a part by head. bias: added to the first len(bias) channels of x; it gets
    no gradient (see `octic.irrep_linear`).
    """
    if composed.is_composed():
        return tuple(plain_split(x, bias, heads, widths, parts))
    if torch.is_grad_enabled():
        return _Split.apply(x, bias, heads, list(widths), parts)
    return tuple(_split(x, bias, heads, widths, parts))


def join_heads(tensors: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
    """P tensors of heads [B T H D/H] to features [B T P*D]: the inverse of `split_heads`."""
    if composed.is_composed():
        return plain_join(tensors, widths)
    if torch.is_grad_enabled():
        return _Join.apply(list(widths), *tensors)
    return _join(tensors, widths)


@operator("split_heads(Tensor x, Tensor? bias, int heads, int[] widths, int parts) -> Tensor[]")
def _split(
    x: Tensor, bias: Tensor | None, heads: int, widths: Sequence[int], parts: int
) -> list[Tensor]:
    if runs_triton(x) and parts <= 3:
        return launch("triton_heads.split", x, x.contiguous(), bias, heads, widths, parts)
    return plain_split(x, bias, heads, widths, parts)


@operator("join_heads(Tensor[] tensors, int[] widths) -> Tensor")
def _join(tensors: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
    if runs_triton(tensors[0]) and len(tensors) <= 3:
        dense = [tensor.contiguous() for tensor in tensors]
        return launch("triton_heads.join", tensors[0], dense, widths)
    return plain_join(tensors, widths)


@torch.library.register_fake("octic::split_heads")
def _(
    x: Tensor, bias: Tensor | None, heads: int, widths: Sequence[int], parts: int
) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], heads, sum(widths)) for _ in range(parts)]


@torch.library.register_fake("octic::join_heads")
def _(tensors: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
    first = tensors[0]
    width = len(tensors) * first.shape[-2] * first.shape[-1]
    return first.new_empty(*first.shape[:-2], width)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, heads: int, widths: list[int], parts: int
    ) -> tuple[Tensor, ...]:
        ctx.widths = widths
        return tuple(_split(x, bias, heads, widths, parts))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return join_heads(grads, ctx.widths), None, None, None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, widths: list[int], *tensors: Tensor) -> Tensor:
        ctx.widths, ctx.heads, ctx.parts = widths, tensors[0].shape[-2], len(tensors)
        return _join(tensors, widths)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return None, *split_heads(grad, ctx.heads, ctx.widths, ctx.parts)


multiplies_nothing(torch.ops.octic.split_heads, torch.ops.octic.join_heads)
