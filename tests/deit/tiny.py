"""A DeiT recipe small enough for tests: 16-pixel noise of three classes, two blocks."""

from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

import octic.models
import vit.models
from deit.augment import ThreeAugment
from deit.recipe import DeiT
from deit.schedules import Schedules

BACKBONES = {
    "hybrid": octic.models.hybrid_deit_small_patch16,
    "invariant": octic.models.d8_inv_early_deit_small_patch16,
    "plain": vit.models.deit_small_patch16_LS,
}
CLASSES = 3


class Noise:
    """Random images with labels."""

    class_names = [f"class {index}" for index in range(CLASSES)]

    def __init__(self, size: int = 12) -> None:
        self.images = np.random.default_rng(0).integers(0, 255, (size, 20, 20, 3), dtype=np.uint8)
        self.labels = np.arange(size) % CLASSES

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return "Noise"

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def label(self, index: int) -> int | None:
        return int(self.labels[index])

    def path(self, index: int) -> str:
        return f"noise {index}"


def make_backbone(family: str = "hybrid", **keywords: Any) -> partial:
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    defaults = size | {"mlp_ratio": 2.0, "num_classes": CLASSES, "init_values": 0.1}
    return partial(BACKBONES[family], **defaults | keywords)


def make_recipe(family: str = "hybrid", *, kind: type[DeiT] = DeiT, **options: Any) -> DeiT:
    defaults = {
        "backbone": make_backbone(family),
        "dataset": Noise(),
        "batch_size_per_gpu": 4,
        "epochs": 4,
        "drop_path_rate": 0.0,
        "sampler": "shuffled",
        "num_workers": 0,
        "augmentation": ThreeAugment(input_size=16),
        "schedules": Schedules(warmup_epochs=1),
    }
    return kind(**defaults | options)


def make_batch(size: int = 4, seed: int = 0, *, mixed: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 16, 16, generator=generator)
    labels = torch.arange(size) % CLASSES
    targets = torch.nn.functional.one_hot(labels, CLASSES).float()
    return {
        "images": images,
        "targets": 0.6 * targets + 0.4 * targets.flip(0) if mixed else labels,
    }
