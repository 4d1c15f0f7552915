"""Multi-crop augmentation of DINOv2: two global and some local crops of one image.

Caron et al. 2021, section 3; Grill et al. 2020 (BYOL) for the colours. Randomness comes from
torch's global generator, which the loader seeds for each sample.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from utils.ranges import check_count, check_order, check_share

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class MultiCrop:
    """An RGB image to {"global_crops": [2 3 S S], "local_crops": [n 3 s s]} (the latter if n > 0).

    Sizes in pixels, scales as parts of the image's area, probabilities in the order first global
    crop, second global crop, local crops.

    Departs from DINOv2: there the wrapper of the blur inverts its probability, so that the intended
    (1.0, 0.1, 0.5) acts as (0.0, 0.9, 0.5). The published runs are had with the latter.
    """

    def __init__(
        self,
        *,
        global_crops_size: int = 224,
        global_crops_scale: Sequence[float] = (0.32, 1.0),
        local_crops_number: int = 8,
        local_crops_size: int = 96,
        local_crops_scale: Sequence[float] = (0.05, 0.32),
        blur_probabilities: Sequence[float] = (1.0, 0.1, 0.5),
        blur_kernel_size: int = 9,
        solarize_probability: float = 0.2,
        color_jitter_probability: float = 0.8,
        grayscale_probability: float = 0.2,
        flip_probability: float = 0.5,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        check_crops(
            global_crops_size,
            local_crops_number,
            local_crops_size,
            blur_probabilities,
            blur_kernel_size,
        )
        check_shares(
            scales={
                "global_crops_scale": global_crops_scale,
                "local_crops_scale": local_crops_scale,
            },
            probabilities={
                "solarize_probability": solarize_probability,
                "color_jitter_probability": color_jitter_probability,
                "grayscale_probability": grayscale_probability,
                "flip_probability": flip_probability,
            },
        )
        self.global_crops_size = global_crops_size
        self.local_crops_number = local_crops_number
        self.local_crops_size = local_crops_size
        jitter = T.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)

        def pipeline(size: int, scale: Sequence[float], blur: float, solarize: float) -> T.Compose:
            return T.Compose(
                [
                    T.RandomResizedCrop(
                        size, scale=tuple(scale), interpolation=InterpolationMode.BICUBIC
                    ),
                    T.RandomHorizontalFlip(flip_probability),
                    T.RandomApply([jitter], color_jitter_probability),
                    T.RandomGrayscale(grayscale_probability),
                    T.RandomApply([T.GaussianBlur(blur_kernel_size, sigma=(0.1, 2.0))], blur),
                    T.RandomSolarize(128, solarize),
                    T.ToTensor(),
                    T.Normalize(tuple(mean), tuple(std)),
                ]
            )

        first, second, local = blur_probabilities
        self.first_global = pipeline(global_crops_size, global_crops_scale, first, 0.0)
        self.second_global = pipeline(
            global_crops_size, global_crops_scale, second, solarize_probability
        )
        self.local = pipeline(local_crops_size, local_crops_scale, local, 0.0)

    def __call__(self, image: Image) -> dict[str, Tensor]:
        """Crops of one image, each drawn from the whole of it."""
        crops = {"global_crops": torch.stack([self.first_global(image), self.second_global(image)])}
        if self.local_crops_number:
            crops["local_crops"] = torch.stack(
                [self.local(image) for _ in range(self.local_crops_number)]
            )
        return crops

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Nothing is left to the device."""
        return batch


def check_crops(
    global_crops_size: int,
    local_crops_number: int,
    local_crops_size: int,
    blur_probabilities: Sequence[float],
    blur_kernel_size: int,
) -> None:
    """ValueError for sizes and a blur that cannot be."""
    check_count("local_crops_number", local_crops_number)
    check_count("global_crops_size", global_crops_size, 1)
    check_count("local_crops_size", local_crops_size, 1 if local_crops_number else 0)
    if len(blur_probabilities) != 3:
        raise ValueError(
            "blur_probabilities takes three values (first global, second global, local crops), "
            f"not {list(blur_probabilities)}"
        )
    for probability in blur_probabilities:
        check_share("blur_probabilities", probability)
    smallest = min([global_crops_size, *[local_crops_size] * bool(local_crops_number)])
    if blur_kernel_size < 1 or blur_kernel_size % 2 == 0 or blur_kernel_size // 2 >= smallest:
        raise ValueError(
            f"blur_kernel_size must be odd and less than twice the smallest crop, {smallest}; "
            f"not {blur_kernel_size}"
        )


def check_shares(
    *, scales: Mapping[str, Sequence[float]], probabilities: Mapping[str, float]
) -> None:
    """ValueError for shares of the image's area, and for probabilities, that are none."""
    for key, scale in scales.items():
        check_order(key, scale, 0, 1, ends="(]")
    for key, probability in probabilities.items():
        check_share(key, probability)
