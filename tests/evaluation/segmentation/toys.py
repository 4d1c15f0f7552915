"""Images and masks small enough for tests, and a store to fill by hand."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaluation.segmentation.patches import majority_labels
from evaluation.segmentation.store import PatchStore, Shape
from utils import distributed


class ToyMasks:
    """Quarters of random labels, each of the colour of its label; a strip at the top is void."""

    name, ignore_labels = "toy", (255,)

    def __init__(self, length: int, *, seed: int = 0, size: int = 32, num_classes: int = 4) -> None:
        random = np.random.RandomState(seed)
        quarters = random.randint(num_classes, size=(length, 2, 2))
        self.masks = quarters.repeat(size // 2, 1).repeat(size // 2, 2).astype(np.uint8)
        colours = np.random.RandomState(9).randint(256, size=(num_classes, 3))
        noise = random.randint(-20, 20, size=(length, size, size, 3))
        self.pixels = (colours[self.masks] + noise).clip(0, 255).astype(np.uint8)
        self.masks[:, :1] = 255
        self.class_names = [f"class {label}" for label in range(num_classes)]

    def __len__(self) -> int:
        return len(self.masks)

    def __repr__(self) -> str:
        return f"toy ({len(self)} images)"

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def read_mask(self, index: int) -> np.ndarray:
        return self.masks[index]

    def path(self, index: int) -> str:
        return f"toy {index}"


def make_store(
    features: Tensor, labels: Tensor, *, per_image: int = 1, folder: Path | None = None
) -> PatchStore:
    """This rank's store of the patches of all ranks [N, D] and their labels [N, p^2]."""
    images = len(features) // per_image
    shape = Shape(images, per_image, labels.shape[1], features.shape[1])
    store = PatchStore(shape, dtype=torch.float32, folder=folder)
    own = slice(distributed.rank(), None, distributed.world_size())
    features = features.view(images, per_image, -1)[own].flatten(0, 1)
    labels = labels.view(images, per_image, -1)[own].flatten(0, 1)
    store.write(0, features, labels, majority_labels(labels))
    return store


def random_patches(count: int, *, seed: int = 0, dim: int = 6) -> tuple[Tensor, Tensor]:
    """Features around one centre per label, and labels [count, 9] that mostly agree."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(4, (count, 1), generator=generator)
    centres = torch.randn(4, dim, generator=torch.Generator().manual_seed(7))
    features = centres[label[:, 0]] + torch.randn(count, dim, generator=generator)
    other = torch.randint(5, (count, 9), generator=generator)
    mixed = torch.rand(count, 9, generator=generator) < 0.3
    return features, label.expand(-1, 9).where(~mixed, other).to(torch.uint8)
