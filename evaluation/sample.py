"""Sample a few images for a net.

Letters: B images, H height and width.
"""

import torch
from PIL import Image
from torch import Tensor

from utils.data.images import ImageDataset
from utils.data.transforms import evaluation_transform
from utils.errors import UserError

# Positions of further crops of one image, as fractions of the free width and height.
CORNERS = ((0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0))
CROP = 0.7  # side of these crops, as a fraction of the image's shorter side


def spread(total: int, count: int) -> list[int]:
    """`count` of `total` indices, ascending, from the first to the last; all if there are fewer.

    Data sets are ordered by class, so the first ones would be of one class.
    """
    return torch.linspace(0, total - 1, min(count, total)).long().tolist()


def sample_images(dataset: ImageDataset, *, size: int, count: int) -> Tensor:
    """`count` normalised images [B 3 size size], spread evenly over the data set.

    The shorter side becomes `size` before a central crop. If there are fewer images than `count`,
    further crops of them are added.
    """
    if count < 1 or size < 1:
        raise UserError(f"{count} images of {size} pixels asked for; both must be at least 1")
    if not len(dataset):
        raise UserError(f"{dataset!r} holds no image")
    transform = evaluation_transform(resize_size=size, crop_size=size)
    if count <= len(dataset):
        chosen = spread(len(dataset), count)
        return torch.stack([transform(dataset.read(index)) for index in chosen])
    rounds = (divmod(index, len(dataset)) for index in range(count))
    return torch.stack([transform(_crop(dataset.read(index), turn)) for turn, index in rounds])


def _crop(image: Image.Image, turn: int) -> Image.Image:
    """The whole image in turn 0, then squares at its corners, smaller after each round of four."""
    if turn == 0:
        return image
    side = max(1, int(CROP * min(image.size) / (1 + (turn - 1) // len(CORNERS))))
    right, down = CORNERS[(turn - 1) % len(CORNERS)]
    left, top = int(right * (image.width - side)), int(down * (image.height - side))
    return image.crop((left, top, left + side, top + side))
