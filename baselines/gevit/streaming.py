"""Attention over the group in pieces: the cubic tensor of scores is never built as a whole.

For every head and query pixel the published attention makes a score for each output element v,
query element g, key element m and key position j, |G|^3 J numbers. Three facts let them stream:

    score_v(g; m, j) = content(g; m, j) + position_v(g; j) + relation_v(g; m)
    y_v = sum_g sum_(m,j) softmax_(m,j)(score_v(g; .)) value(m, j)

the content does not depend on v; the values do not depend on g, so probabilities are summed over g
before they meet the values; and each v and each query pixel is independent.

Letters in shapes: N images, heads and query pixels, v g m elements (output, query, key), J key
positions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

MB = 1e6


def summed_probabilities(
    content: Tensor, position: Tensor, relation: Tensor | None, drop_rate: float = 0.0
) -> Tensor:
    """Probabilities summed over the query's elements [N v m J], one v at a time.

    content [N g m J], position [N g v J] (-inf: no such key), relation [N g v m] or None.
    drop_rate: share of the probabilities set to zero. The backward pass recomputes the
    probabilities of one v at a time. Softmax is in float32 at least.
    """
    seed = 0
    if drop_rate:
        seed = int(torch.randint(2**62, ()))
    return _Summed.apply(content, position, relation, drop_rate, seed)


class _Summed(torch.autograd.Function):
    """`summed_probabilities`, keeping nothing cubic for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        content: Tensor,
        position: Tensor,
        relation: Tensor | None,
        drop_rate: float,
        seed: int,
    ) -> Tensor:
        ctx.save_for_backward(content, position, relation)
        ctx.drop_rate, ctx.seed = drop_rate, seed
        count, (_, elements, keys) = position.shape[-2], content.shape[-3:]
        out = content.new_empty(*content.shape[:-3], count, elements, keys)
        for v in range(count):
            shares = _softmax(content, position, relation, v)
            if drop_rate:
                shares *= _kept(shares, drop_rate, seed + v)
            out[..., v, :, :] = shares.sum(dim=-3)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        content, position, relation = ctx.saved_tensors
        to_content = torch.zeros_like(content)
        to_position = torch.empty_like(position)
        to_relation = None if relation is None else torch.empty_like(relation)
        for v in range(position.shape[-2]):
            shares = _softmax(content, position, relation, v)
            wanted = grad[..., v, :, :].unsqueeze(-3).expand_as(shares).to(shares.dtype)
            if ctx.drop_rate:
                wanted = wanted * _kept(shares, ctx.drop_rate, ctx.seed + v)
            scores = torch.ops.aten._softmax_backward_data(
                wanted.flatten(-2), shares.flatten(-2), -1, shares.dtype
            ).view_as(shares)
            to_content += scores
            to_position[..., v, :] = scores.sum(dim=-2)
            if to_relation is not None:
                to_relation[..., v, :] = scores.sum(dim=-1)
        return to_content, to_position, to_relation, None, None


def all_probabilities(content: Tensor, position: Tensor, relation: Tensor | None) -> Tensor:
    """All probabilities at once [N v g m J], to look at."""
    outputs = range(position.shape[-2])
    return torch.stack([_softmax(content, position, relation, v) for v in outputs], dim=-4)


def tile_sizes(images: int, rows: int, row_bytes: int, memory_mb: float) -> tuple[int, int]:
    """Images and rows of query pixels to attend for at once, where one row takes `row_bytes`.

    At least one row of one image, whatever its size.
    """
    fitting = max(1, int(memory_mb * MB // row_bytes))
    return (min(images, fitting // rows), rows) if fitting >= rows else (1, fitting)


def in_tiles(
    run: Callable[[slice, slice], Tensor],
    size: tuple[int | None, int],
    tile: tuple[int, int],
    *,
    recompute: bool,
    random: bool,
) -> Tensor:
    """`run(images, rows)` on parts of images and rows, put together along dimensions 0 and -2.

    size: of images None stands for any number, all in one part.
    recompute: each part is recomputed in the backward pass instead of being kept; `random`
    says that it draws random numbers, which must then be the same.
    """
    recompute = recompute and torch.is_grad_enabled()

    def part(images: slice, rows: slice) -> Tensor:
        if not recompute:
            return run(images, rows)
        return checkpoint(run, images, rows, use_reentrant=False, preserve_rng_state=random)

    return _joined(
        [
            _joined([part(images, rows) for rows in _slices(size[1], tile[1])], -2)
            for images in _slices(size[0], tile[0])
        ],
        0,
    )


def _slices(count: int | None, step: int) -> list[slice]:
    if count is None:
        return [slice(None)]
    # For an empty input one empty part, because the shape is still needed.
    steps = range(0, max(count, 1), max(step, 1))
    return [slice(first, min(first + step, count)) for first in steps]


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _softmax(content: Tensor, position: Tensor, relation: Tensor | None, v: int) -> Tensor:
    """Jointly over key elements and positions, for one output element: [N g m J]."""
    scores = content + position[..., v, :].unsqueeze(-2)
    if relation is not None:
        scores += relation[..., v, :].unsqueeze(-1)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return scores.flatten(-2).softmax(dim=-1, dtype=dtype).view_as(scores)


def _kept(shares: Tensor, drop_rate: float, seed: int) -> Tensor:
    """Factors of dropout, a function of the seed alone: 0, or 1 / (1 - drop_rate)."""
    generator = torch.Generator(shares.device).manual_seed(seed)
    return torch.empty_like(shares).bernoulli_(1 - drop_rate, generator=generator) / (1 - drop_rate)
