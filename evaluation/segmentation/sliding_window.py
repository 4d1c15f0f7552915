"""Logits of an image of any size from overlapping square windows.

Letters: H W size of the image, S side of a window, C classes, n windows.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Start positions of windows along one side: every `stride`, the last one moved back to fit."""
    count = -(-max(length - window, 0) // stride) + 1
    return [min(number * stride, length - window) for number in range(count)]


def corners(height: int, width: int, window: int, stride: int) -> list[tuple[int, int]]:
    """(top, left) of the windows that cover an image, row by row."""
    lefts = window_starts(width, window, stride)
    return [(top, left) for top in window_starts(height, window, stride) for left in lefts]


def slide(
    predict: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    window: int,
    stride: int,
    batch_size: int,
) -> Tensor:
    """Logits [C H W] of an image [3 H W], averaged at each pixel over the windows that contain it.

    predict: windows [n 3 S S] to logits [n C S S].
    """
    height, width = image.shape[-2:]
    places = corners(height, width, window, stride)
    total: Tensor | None = None
    seen = torch.zeros(height, width, device=image.device)
    for first in range(0, len(places), batch_size):
        batch = places[first : first + batch_size]
        views = [image[:, top : top + window, left : left + window] for top, left in batch]
        for (top, left), logits in zip(batch, predict(torch.stack(views)), strict=True):
            if total is None:
                total = logits.new_zeros((len(logits), height, width))
            total[:, top : top + window, left : left + window] += logits
            seen[top : top + window, left : left + window] += 1
    assert total is not None
    return total / seen
