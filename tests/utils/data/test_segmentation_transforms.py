"""Squashing keeps image and mask aligned and invents no label."""

import numpy as np
import torch
from PIL import Image

from utils.data.segmentation_transforms import squash, squash_image
from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD


def test_both_become_square_and_stay_aligned() -> None:
    mask = np.zeros((40, 90), dtype=np.uint8)
    mask[:, 45:] = 200
    image = Image.fromarray(np.stack([mask] * 3, axis=-1))
    pixels, labels = squash(image, mask, 20)
    assert pixels.shape == (3, 20, 20) and pixels.dtype == torch.float32
    assert labels.shape == (20, 20) and labels.dtype == torch.uint8
    assert set(labels.unique().tolist()) == {0, 200}
    grey = pixels[0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]
    assert torch.equal(grey > 100 / 255, labels == 200)


def test_the_image_is_what_pillow_makes_of_it() -> None:
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (9, 30, 3), dtype=np.uint8))
    expected = image.resize((16, 16), Image.Resampling.BICUBIC)
    assert squash_image(image, 16).tobytes() == expected.tobytes()
