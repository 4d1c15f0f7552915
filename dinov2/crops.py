"""Multi-crop augmentation of DINOv2: two global and some local crops of one image.

Caron et al. 2021, section 3; Grill et al. 2020 (BYOL) for the colours. Randomness comes from
torch's global generator, which the loader seeds for each sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from utils.ranges import check_count, check_order, check_share


@dataclass(kw_only=True, eq=False, repr=False)
class CropOptions:
    """Options of the multi-crop augmentations; ValueError for invalid ones.

    Sizes in pixels, scales as parts of the image's area, probabilities of the blur in the order
    first global crop, second global crop, local crops.
    """

    global_crops_size: int = 224
    global_crops_scale: Sequence[float] = (0.32, 1.0)
    local_crops_number: int = 8
    local_crops_size: int = 96
    local_crops_scale: Sequence[float] = (0.05, 0.32)
    blur_probabilities: Sequence[float] = (1.0, 0.1, 0.5)
    blur_kernel_size: int = 9
    solarize_probability: float = 0.2
    color_jitter_probability: float = 0.8
    grayscale_probability: float = 0.2
    flip_probability: float = 0.5
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD

    def __post_init__(self) -> None:
        check_count("local_crops_number", self.local_crops_number)
        check_count("global_crops_size", self.global_crops_size, 1)
        check_count("local_crops_size", self.local_crops_size, 1 if self.local_crops_number else 0)
        self._check_blur()
        for key in ("global_crops_scale", "local_crops_scale"):
            check_order(key, getattr(self, key), 0, 1, ends="(]")
        for key in ("solarize", "color_jitter", "grayscale", "flip"):
            check_share(f"{key}_probability", getattr(self, f"{key}_probability"))

    def _check_blur(self) -> None:
        if len(self.blur_probabilities) != 3:
            raise ValueError(
                "blur_probabilities takes three values (first global, second global, local crops), "
                f"not {list(self.blur_probabilities)}"
            )
        for probability in self.blur_probabilities:
            check_share("blur_probabilities", probability)
        local = [self.local_crops_size] * bool(self.local_crops_number)
        smallest, size = min([self.global_crops_size, *local]), self.blur_kernel_size
        if size < 1 or size % 2 == 0 or size // 2 >= smallest:
            raise ValueError(
                f"blur_kernel_size must be odd and less than twice the smallest crop, {smallest}; "
                f"not {size}"
            )


class MultiCrop(CropOptions):
    """An RGB image to {"global_crops": [2 3 S S], "local_crops": [n 3 s s]} (the latter if n > 0).

    Keywords as of `CropOptions`.

    Departs from DINOv2: there the wrapper of the blur inverts its probability, so that the intended
    (1.0, 0.1, 0.5) acts as (0.0, 0.9, 0.5). Set the latter to reproduce the published runs.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        first, second, local = self.blur_probabilities
        size, scale = self.global_crops_size, self.global_crops_scale
        self.first_global = self._pipeline(size, scale, first, 0.0)
        self.second_global = self._pipeline(size, scale, second, self.solarize_probability)
        self.local = self._pipeline(self.local_crops_size, self.local_crops_scale, local, 0.0)

    def _pipeline(
        self, size: int, scale: Sequence[float], blur: float, solarize: float
    ) -> T.Compose:
        jitter = T.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
        bicubic = InterpolationMode.BICUBIC
        # Left out at probability 0: it would draw a random number and change a seed's crops.
        inverted = [T.RandomSolarize(128, solarize)] if solarize else []
        return T.Compose(
            [
                T.RandomResizedCrop(size, scale=tuple(scale), interpolation=bicubic),
                T.RandomHorizontalFlip(self.flip_probability),
                T.RandomApply([jitter], self.color_jitter_probability),
                T.RandomGrayscale(self.grayscale_probability),
                T.RandomApply([T.GaussianBlur(self.blur_kernel_size, sigma=(0.1, 2.0))], blur),
                *inverted,
                T.ToTensor(),
                T.Normalize(tuple(self.mean), tuple(self.std)),
            ]
        )

    def __call__(self, image: Image) -> dict[str, Tensor]:
        """Crops of one image, each drawn from the whole of it."""
        crops = {"global_crops": torch.stack([self.first_global(image), self.second_global(image)])}
        if self.local_crops_number:
            crops["local_crops"] = torch.stack(
                [self.local(image) for _ in range(self.local_crops_number)]
            )
        return crops
