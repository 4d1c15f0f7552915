"""Augmentation of one image: DeiT III's 3-Augment, or timm's.

Randomness comes from the global generators of torch, numpy and random, which the loader seeds for
each sample.
"""

import random
from collections.abc import Sequence
from typing import Any

from PIL import ImageFilter
from PIL.Image import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from utils.ranges import check_count, check_order, check_range, check_share

CROPS = ("random_resized", "simple")
SMALL = 32  # up to this size timm's augmentation pads and crops instead of zooming


class GaussianBlur:
    """Pillow's blur at a radius drawn from a range, in pixels."""

    def __init__(self, radius: Sequence[float] = (0.1, 2.0)) -> None:
        self.radius = radius

    def __call__(self, image: Image) -> Image:
        """Blur one image."""
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.radius)))


class ThreeAugment:
    """RGB image to a normalised tensor [3 S S] (Touvron et al. 2022, "3-Augment"), in this order.

    Crop; mirror image; one of grey, solarised and blurred; colour jitter; tensor, normalised.
    crop: `random_resized` (a part of the image's area, from `scale`, in an aspect ratio of 3/4 to
    4/3) or `simple` (smaller side to S, reflected by 4 pixels, S x S cut out). color_jitter: by how
    much brightness, contrast and saturation may change, 0 for none.
    """

    def __init__(
        self,
        *,
        input_size: int = 224,
        crop: str = "random_resized",
        scale: Sequence[float] = (0.08, 1.0),
        flip_probability: float = 0.5,
        three_probability: float = 1.0,
        color_jitter: float = 0.3,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        check_three(
            input_size=input_size,
            crop=crop,
            scale=scale,
            flip_probability=flip_probability,
            three_probability=three_probability,
            color_jitter=color_jitter,
        )
        self.input_size = input_size
        bicubic = InterpolationMode.BICUBIC
        if crop == "simple":
            geometry = [
                T.Resize(input_size, interpolation=bicubic),
                T.RandomCrop(input_size, padding=4, padding_mode="reflect"),
            ]
        else:
            geometry = [T.RandomResizedCrop(input_size, scale=tuple(scale), interpolation=bicubic)]
        three = T.RandomChoice(
            [T.Grayscale(num_output_channels=3), T.RandomSolarize(128, p=1.0), GaussianBlur()]
        )
        jitter = [T.ColorJitter(color_jitter, color_jitter, color_jitter)] * bool(color_jitter)
        self.steps = T.Compose(
            [
                *geometry,
                T.RandomHorizontalFlip(flip_probability),
                T.RandomApply([three], three_probability),
                *jitter,
                T.ToTensor(),
                T.Normalize(tuple(mean), tuple(std)),
            ]
        )

    def __call__(self, image: Image) -> Tensor:
        """Augment one image."""
        return self.steps(image)

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Nothing is left to the device."""
        return batch


def check_three(
    *,
    input_size: int,
    crop: str,
    scale: Sequence[float],
    flip_probability: float,
    three_probability: float,
    color_jitter: float,
) -> None:
    """ValueError for keywords of 3-Augment without a meaning."""
    if crop not in CROPS:
        raise ValueError(f"unknown crop {crop!r}; known: {', '.join(CROPS)}")
    check_count("input_size", input_size, 1)
    check_order("scale", scale, 0, 1, ends="(]")
    check_share("flip_probability", flip_probability)
    check_share("three_probability", three_probability)
    check_range("color_jitter", color_jitter)


class TimmAugmentation:
    """timm's augmentation (RandAugment and the like, random erasing) with DeiT's defaults."""

    def __init__(
        self,
        *,
        input_size: int = 224,
        color_jitter: float = 0.3,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        interpolation: str = "bicubic",
        erase_probability: float = 0.25,
        erase_mode: str = "pixel",
        erase_count: int = 1,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        check_count("input_size", input_size, 1)
        check_range("color_jitter", color_jitter)
        check_share("erase_probability", erase_probability)
        check_count("erase_count", erase_count, 1)
        self.input_size = input_size
        self.steps = create_transform(
            input_size,
            is_training=True,
            color_jitter=color_jitter,
            auto_augment=auto_augment,
            interpolation=interpolation,
            re_prob=erase_probability,
            re_mode=erase_mode,
            re_count=erase_count,
            mean=tuple(mean),
            std=tuple(std),
        )
        if input_size <= SMALL:
            self.steps.transforms[0] = T.RandomCrop(input_size, padding=4)

    def __call__(self, image: Image) -> Tensor:
        """Augment one image."""
        return self.steps(image)

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Nothing is left to the device."""
        return batch
