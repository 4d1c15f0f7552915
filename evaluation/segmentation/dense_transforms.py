"""Transforms of images and masks for the per-pixel linear probe.

Letters: H W size as stored, S side of a crop.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from evaluation.segmentation.dense_head import PixelHeadSettings
from utils.data.segmentation import SegmentationDataset
from utils.data.transforms import to_normalized_tensor

IGNORED = 255  # class of pixels that count nowhere, and of the padding
MAX_SHARE = 0.75  # of a crop that one class should take
CROP_TRIES = 10
Pair = tuple[Image.Image, np.ndarray]


class ClassTable:
    """Maps stored labels to classes 0 .. C - 1 and back; ignored labels become class 255.

    For ADE20K, whose label 0 is ignored, this is what others call reducing the zero label.
    """

    def __init__(self, num_labels: int, ignore_labels: Sequence[int]) -> None:
        self.labels = np.array(
            [label for label in range(num_labels) if label not in ignore_labels], dtype=np.uint8
        )
        self._classes = np.full(256, IGNORED, dtype=np.uint8)
        self._classes[self.labels] = np.arange(len(self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def to_classes(self, mask: np.ndarray) -> np.ndarray:
        """Labels as stored to classes, uint8 [H W]."""
        return self._classes[mask]


class Pairs:
    """A segmentation data set for the loaders of images: each item is an image and its mask."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset
        self.class_names: list[str] = []
        self.labels = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __repr__(self) -> str:
        return repr(self.dataset)

    def read(self, index: int) -> Pair:
        """Decoded RGB image and labels as stored."""
        return self.dataset.read(index), self.dataset.read_mask(index)

    def label(self, index: int) -> None:
        """No class for the whole image."""

    def path(self, index: int) -> str:
        """File of an image."""
        return self.dataset.path(index)


class TrainingCrop:
    """(image, mask) to a crop: float32 [3 S S], classes uint8 [S S], and a seed for the head.

    The shorter side becomes `image_size` times a random number of `scale`; of up to ten random
    places the first is taken where no class has three quarters of the counted pixels or more, else
    one more; then mirroring, photometric distortion (as SSD and mmsegmentation have it) and, after
    normalising, padding at the right and bottom with zeros and ignored labels. Draws from torch's
    global generator.
    """

    def __init__(self, table: ClassTable, recipe: PixelHeadSettings) -> None:
        self.table, self.recipe = table, recipe
        self.normalise = v2.Compose(to_normalized_tensor())

    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor, int]:
        """Crop one image with its mask."""
        (image, mask), size = pair, self.recipe.crop_size
        width, height = size_of(image, int(self.recipe.image_size * _uniform(*self.recipe.scale)))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        small = Image.fromarray(self.table.to_classes(mask))
        classes = np.array(small.resize((width, height), Image.Resampling.NEAREST))
        top, left = self._place(classes)
        bottom, right = min(top + size, height), min(left + size, width)
        pixels = functional.pil_to_tensor(image.crop((left, top, right, bottom)))
        target = torch.from_numpy(classes[top:bottom, left:right].copy())
        if _uniform(0, 1) < self.recipe.hflip_probability:
            pixels, target = pixels.flip(-1), target.flip(-1)
        if self.recipe.photometric:
            pixels = distort(pixels)
        missing = (0, size - (right - left), 0, size - (bottom - top))
        crop = nn.functional.pad(self.normalise(pixels.float() / 255), missing)
        target = nn.functional.pad(target, missing, value=IGNORED)
        return crop, target, int(torch.randint(2**62, ()))

    def _place(self, classes: np.ndarray) -> tuple[int, int]:
        size = self.recipe.crop_size
        for _ in range(CROP_TRIES):
            top, left = (_below(max(side - size, 0) + 1) for side in classes.shape)
            part = classes[top : top + size, left : left + size]
            counts = np.bincount(part.reshape(-1), minlength=256)[:IGNORED]
            if 0 < counts.max() < MAX_SHARE * counts.sum():
                return top, left
        top, left = (_below(max(side - size, 0) + 1) for side in classes.shape)
        return top, left


class WholeImage:
    """(image, mask) to float32 [3 h w] with the shorter side `image_size`; the mask stays."""

    def __init__(self, *, image_size: int) -> None:
        self.image_size = image_size
        self.normalise = v2.Compose(to_normalized_tensor())

    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Resize one image; labels as stored, uint8 [H W]."""
        image, mask = pair
        image = image.resize(size_of(image, self.image_size), Image.Resampling.BILINEAR)
        return self.normalise(image), torch.from_numpy(mask)


def size_of(image: Image.Image, short: int) -> tuple[int, int]:
    """(width, height) with the shorter side `short`, the longer rounded to the nearest pixel."""
    width, height = image.size
    if height > width:
        return short, int(short * height / width + 0.5)
    return int(short * width / height + 0.5), short


def distort(pixels: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, each changed with probability 1/2 (uint8 [3 S S]).

    Brightness: plus -32 to 32; contrast and saturation: times 0.5 to 1.5; hue: any. The contrast
    comes before or after saturation and hue, as a coin says.
    """
    if _coin():
        pixels = _to_bytes(pixels.float() + _uniform(-32, 32))
    contrast_first = _coin()
    if contrast_first and _coin():
        pixels = _to_bytes(pixels.float() * _uniform(0.5, 1.5))
    if _coin():
        pixels = functional.adjust_saturation(pixels, _uniform(0.5, 1.5))
    if _coin():
        pixels = functional.adjust_hue(pixels, _uniform(-0.5, 0.5))
    if not contrast_first and _coin():
        pixels = _to_bytes(pixels.float() * _uniform(0.5, 1.5))
    return pixels


def round_to_patches(size: int, patch_size: int) -> int:
    """The multiple of the patch size nearest to `size`, at least one patch."""
    return max(int(size / patch_size + 0.5), 1) * patch_size


def _to_bytes(values: Tensor) -> Tensor:
    return values.clamp(0, 255).to(torch.uint8)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _below(end: int) -> int:
    return int(torch.randint(end, ()))


def _coin() -> bool:
    return _below(2) == 1
