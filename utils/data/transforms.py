"""From a PIL image to a normalised tensor, as the published ImageNet probes do it."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def evaluation_transform(
    *,
    resize_size: int = 256,
    crop_size: int = 224,
    interpolation: str = "bicubic",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> v2.Compose:
    """Smaller edge to `resize_size`, central crop, tensor [3 crop crop] float32, normalised.

    Images smaller than the crop are padded with black before normalising.
    """
    resize = v2.Resize(resize_size, interpolation=InterpolationMode(interpolation), antialias=True)
    return v2.Compose([resize, v2.CenterCrop(crop_size), *to_normalized_tensor(mean, std)])


def deit_evaluation_transform(
    *, input_size: int = 224, eval_crop_ratio: float = 1.0, resize_small: bool = False
) -> v2.Compose:
    """DeiT's: smaller edge to input_size / eval_crop_ratio, central crop, tensor, normalised.

    With an input_size of 32 or less, meant for CIFAR, images pass as they are; with `resize_small`
    only those of that size do.
    """
    if input_size < 1 or not 0 < eval_crop_ratio <= 1:
        raise ValueError(
            f"input_size {input_size} must be positive and eval_crop_ratio {eval_crop_ratio} lie "
            "above 0 and at most at 1"
        )
    crop: list[torch.nn.Module] = [
        v2.Resize(
            int(input_size / eval_crop_ratio),
            interpolation=InterpolationMode.BICUBIC,
            antialias=True,
        ),
        v2.CenterCrop(input_size),
    ]
    if input_size <= 32:
        crop = [UnlessOfSize(input_size, *crop)] if resize_small else []
    return v2.Compose([*crop, *to_normalized_tensor()])


def training_transform(
    *,
    crop_size: int = 224,
    scale: tuple[float, float] = (0.08, 1.0),
    hflip_probability: float = 0.5,
    interpolation: str = "bicubic",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> v2.Compose:
    """Random resized crop, mirroring, tensor [3 crop crop] float32, normalised (linear probe)."""
    crop = v2.RandomResizedCrop(
        crop_size, scale=scale, interpolation=InterpolationMode(interpolation), antialias=True
    )
    flip = v2.RandomHorizontalFlip(hflip_probability)
    return v2.Compose([crop, flip, *to_normalized_tensor(mean, std)])


def to_normalized_tensor(
    mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> list[torch.nn.Module]:
    """The last steps of all: PIL image to [0, 1] and normalised; a tensor is only normalised."""
    return [ToTensor(), v2.Normalize(list(mean), list(std))]


class UnlessOfSize(torch.nn.Module):
    """Steps for PIL images, left out for those of `size` x `size`."""

    def __init__(self, size: int, *steps: torch.nn.Module) -> None:
        super().__init__()
        self.size, self.steps = size, v2.Compose(steps)

    def forward(self, image: Image.Image) -> Image.Image:
        """Convert one image."""
        return image if image.size == (self.size, self.size) else self.steps(image)


class ToTensor(torch.nn.Module):
    """PIL image to a float32 tensor [3 H W] in [0, 1]; a tensor passes as it is."""

    def forward(self, image: object) -> Tensor:
        """Convert one image."""
        if isinstance(image, Tensor):
            return image
        return v2.functional.to_dtype(v2.functional.pil_to_tensor(image), torch.float32, scale=True)
