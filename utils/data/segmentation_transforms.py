"""From an image and its mask to tensors, as the published patch probes do it.

Letters: H W size as stored, R resolution.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from utils.data.transforms import to_normalized_tensor


def squash(image: Image.Image, mask: np.ndarray, resolution: int) -> tuple[Tensor, Tensor]:
    """The pair at resolution x resolution: normalised float32 [3 R R] and labels uint8 [R R].

    The aspect ratio is not kept. Image: PIL's bicubic, ImageNet's mean and deviation; mask
    (uint8 [H W]): nearest, so that every pixel keeps a label that was there.
    """
    return squash_to_tensor(image, resolution), torch.from_numpy(squash_mask(mask, resolution))


def squash_to_tensor(image: Image.Image, resolution: int) -> Tensor:
    """The image at resolution x resolution, normalised float32 [3 R R]."""
    return v2.Compose(to_normalized_tensor())(squash_image(image, resolution))


def squash_image(image: Image.Image, resolution: int) -> Image.Image:
    """The image at resolution x resolution, bicubic, not yet normalised."""
    return image.resize((resolution, resolution), Image.Resampling.BICUBIC)


def squash_mask(mask: np.ndarray, resolution: int) -> np.ndarray:
    """The mask at resolution x resolution, nearest."""
    small = Image.fromarray(mask).resize((resolution, resolution), Image.Resampling.NEAREST)
    return np.array(small)
