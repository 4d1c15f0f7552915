"""Random resized crops of one image, all drawn at once and cut from one decoding.

The distribution is that of torchvision's RandomResizedCrop with RandomHorizontalFlip: of ten tries
at an area and an aspect ratio the first that fits into the image counts, else its central part.
Randomness comes from numpy's global generator, which the loader seeds for each sample.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import interpolate

from utils.data.encoded import EncodedImage, pixels_of

TRIES = 10
RATIO = (3 / 4, 4 / 3)  # width / height
SPARE = 2  # decode at this many times a crop's resolution, so that rounding a box moves it little


class CropKind(NamedTuple):
    """`number` square crops of `size` pixels a side from parts of the image of area `scale`."""

    number: int
    size: int
    scale: tuple[float, float]


class Box(NamedTuple):
    """A part of an image, in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool


def draw_boxes(
    height: int,
    width: int,
    count: int,
    scale: Sequence[float],
    *,
    flip_probability: float = 0.5,
) -> list[Box]:
    """Independent boxes of area `scale` (shares of the image's) and aspect ratio `RATIO`."""
    draws = np.random.random_sample((count, 2 * TRIES + 3))
    areas = (scale[0] + (scale[1] - scale[0]) * draws[:, :TRIES]) * (height * width)
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    ratios = np.exp(low + (high - low) * draws[:, TRIES : 2 * TRIES])
    widths = np.rint(np.sqrt(areas * ratios)).astype(int)
    heights = np.rint(np.sqrt(areas / ratios)).astype(int)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    boxes = []
    for own, first, (to_top, to_left, to_flip) in zip(
        range(count), fits.argmax(1).tolist(), draws[:, -3:].tolist(), strict=True
    ):
        mirrored = to_flip < flip_probability
        if not fits[own, first]:
            boxes.append(_central(height, width, mirrored))
            continue
        h, w = int(heights[own, first]), int(widths[own, first])
        top, left = int(to_top * (height - h + 1)), int(to_left * (width - w + 1))
        boxes.append(Box(top, left, h, w, mirrored))
    return boxes


def cut_crops(
    image: EncodedImage | Image, kinds: Sequence[CropKind], *, flip_probability: float = 0.5
) -> list[Tensor]:
    """Crops of each kind, uint8 [count 3 size size], from one decoding of the image.

    A JPEG much larger than its crops is decoded at a part of its size, at least `SPARE` times the
    resolution of every crop.
    """
    height, width = image.size if isinstance(image, EncodedImage) else image.size[::-1]
    boxes = [
        draw_boxes(height, width, kind.number, kind.scale, flip_probability=flip_probability)
        for kind in kinds
    ]
    if isinstance(image, EncodedImage):
        reduction = min(
            min(box.height, box.width) / (SPARE * kind.size)
            for kind, own in zip(kinds, boxes, strict=True)
            for box in own
        )
        pixels = image.decode(reduction)
    else:
        pixels = pixels_of(image)
    steps = pixels.shape[1] / height, pixels.shape[2] / width
    return [
        torch.stack([resized_crop(pixels, _scaled(box, steps), kind.size) for box in own])
        for kind, own in zip(kinds, boxes, strict=True)
    ]


def resized_crop(pixels: Tensor, box: Box, size: int) -> Tensor:
    """A part of an image uint8 [3 H W], resized bicubically to [3 size size] and mirrored or not.

    Antialiased as Pillow does it, with whose result it agrees to one level in 255.
    """
    part = pixels[None, :, box.top : box.top + box.height, box.left : box.left + box.width]
    crop = interpolate(part, size=(size, size), mode="bicubic", antialias=True)[0]
    return crop.flip(-1) if box.mirrored else crop


def _central(height: int, width: int, mirrored: bool) -> Box:
    own = width / height
    w = round(height * RATIO[1]) if own > RATIO[1] else width
    h = round(width / RATIO[0]) if own < RATIO[0] else height
    return Box((height - h) // 2, (width - w) // 2, h, w, mirrored)


def _scaled(box: Box, steps: tuple[float, float]) -> Box:
    """The box in an image decoded at a part of its size."""
    down, right = steps
    if steps == (1.0, 1.0):
        return box
    top, left = round(box.top * down), round(box.left * right)
    bottom = max(top + 1, round((box.top + box.height) * down))
    end = max(left + 1, round((box.left + box.width) * right))
    return Box(top, left, bottom - top, end - left, box.mirrored)
