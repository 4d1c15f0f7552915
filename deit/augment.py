"""Augmentation of one image: DeiT III's 3-Augment, or timm's.

Randomness comes from the global generators of torch, numpy and random, which the loader seeds for
each sample.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import ImageFilter, ImageOps
from PIL.Image import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from utils.ranges import check_count, check_order, check_range, check_share, check_word

CROPS = ("random_resized", "simple")
ERASE_MODES = ("const", "rand", "pixel")
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "random")  # what Pillow turns and shears by too
SMALL = 32  # up to this size timm's augmentation pads and crops instead of zooming


class GaussianBlur:
    """Pillow's blur at a radius drawn from a range, in pixels."""

    def __init__(self, radius: Sequence[float] = (0.1, 2.0)) -> None:
        self.radius = radius

    def __call__(self, image: Image) -> Image:
        """Blur one image."""
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.radius)))


@dataclass(kw_only=True, eq=False, repr=False)
class ThreeOptions:
    """Options of 3-Augment (Touvron et al. 2022); ValueError for invalid ones.

    crop: `random_resized` (a part of the image's area, from `scale`, in an aspect ratio of 3/4 to
    4/3) or `simple` (smaller side to S, reflected by 4 pixels, S x S cut out). color_jitter: by how
    much brightness, contrast and saturation may change, 0 for none.
    """

    input_size: int = 224
    crop: str = "random_resized"
    scale: Sequence[float] = (0.08, 1.0)
    flip_probability: float = 0.5
    three_probability: float = 1.0
    color_jitter: float = 0.3
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD

    def __post_init__(self) -> None:
        check_word("crop", self.crop, CROPS)
        check_count("input_size", self.input_size, 1)
        check_order("scale", self.scale, 0, 1, ends="(]")
        check_share("flip_probability", self.flip_probability)
        check_share("three_probability", self.three_probability)
        check_range("color_jitter", self.color_jitter)


class ThreeAugment(ThreeOptions):
    """RGB image to a normalised tensor [3 S S], in this order.

    Crop; mirror image; one of grey, solarised and blurred; colour jitter; tensor, normalised.
    Keywords as of `ThreeOptions`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        size, bicubic = self.input_size, InterpolationMode.BICUBIC
        if self.crop == "simple":
            geometry = [
                T.Resize(size, interpolation=bicubic),
                T.RandomCrop(size, padding=4, padding_mode="reflect"),
            ]
        else:
            geometry = [T.RandomResizedCrop(size, scale=tuple(self.scale), interpolation=bicubic)]
        three = T.RandomChoice(
            [T.Grayscale(num_output_channels=3), T.RandomSolarize(128, p=1.0), GaussianBlur()]
        )
        strength = self.color_jitter
        self.steps = T.Compose(
            [
                *geometry,
                T.RandomHorizontalFlip(self.flip_probability),
                T.RandomApply([three], self.three_probability),
                *[T.ColorJitter(strength, strength, strength)] * bool(strength),
                T.ToTensor(),
                T.Normalize(tuple(self.mean), tuple(self.std)),
            ]
        )

    def __call__(self, image: Image) -> Tensor:
        """Augment one image."""
        return self.steps(image)


class TimmAugmentation:
    """timm's augmentation (RandAugment and the like, random erasing) with DeiT's defaults.

    ValueError for a policy of auto_augment that timm does not know.
    """

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
        check_word("erase_mode", erase_mode, ERASE_MODES)
        check_word("interpolation", interpolation, INTERPOLATIONS)
        self.input_size = input_size
        try:
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
        except (AssertionError, ValueError) as error:  # all else is checked
            raise ValueError(f"auto_augment {auto_augment!r}: {error}") from error
        if input_size <= SMALL:
            self.steps.transforms[0] = T.RandomCrop(input_size, padding=4, pad_if_needed=True)
        for operation in _operations(self.steps.transforms):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize

    def __call__(self, image: Image) -> Tensor:
        """Augment one image."""
        return self.steps(image)


def posterize(image: Image, bits: int, **_: Any) -> Image:
    """Keep the highest `bits` bits of every channel; 0 gives a black image.

    Replaces timm's, which passes the 0 of its greatest magnitude on to Pillow: new versions refuse
    it, older ones, which published runs used, return a black image.
    """
    if bits < 1:
        return image.point([0] * 256 * len(image.getbands()))
    return image if bits >= 8 else ImageOps.posterize(image, bits)


def _operations(steps: Iterable[Any]) -> Iterator[AugmentOp]:
    """The operations that timm's RandAugment, AutoAugment or AugMix in `steps` choose from."""
    for step in steps:
        for found in (*getattr(step, "ops", ()), *getattr(step, "policy", ())):
            yield from found if isinstance(found, list) else [found]
