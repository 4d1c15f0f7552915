"""A recipe small enough for tests: 16-pixel crops of noise, two blocks, a handful of prototypes."""

from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

import octic.models
import vit.models
from dinov2.crops import MultiCrop
from dinov2.masking import Collate
from dinov2.recipe import DINOv2
from dinov2.schedules import Schedules

BACKBONES = {
    "hybrid": octic.models.hybrid_dinov2_vit_small_patch16,
    "invariant": octic.models.d8_inv_early_dinov2_vit_small_patch16,
    "plain": vit.models.dinov2_vit_small_patch16,
}
HEAD = {"num_prototypes": 24, "hidden_dim": 16, "bottleneck_dim": 8}


class Noise:
    """A dataset of random images."""

    def __init__(self, size: int = 12) -> None:
        self.images = np.random.default_rng(0).integers(0, 255, (size, 20, 20, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def label(self, index: int) -> int | None:
        return None

    def path(self, index: int) -> str:
        return f"noise {index}"


def make_backbone(family: str = "hybrid", **keywords: Any) -> partial:
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return partial(BACKBONES[family], **size | {"mlp_ratio": 2.0} | keywords)


def make_recipe(
    family: str = "hybrid",
    *,
    local_crops_number: int = 2,
    kind: type[DINOv2] = DINOv2,
    **options: Any,
) -> DINOv2:
    defaults = {
        "backbone": make_backbone(family),
        "dataset": Noise(),
        "batch_size_per_gpu": 3,
        "epochs": 4,
        "epoch_length": 3,
        "drop_path_rate": 0.0,
        "dino_head": HEAD,
        "ibot_head": HEAD,
        "num_workers": 0,
        "crops": MultiCrop(
            global_crops_size=16,
            local_crops_size=8,
            local_crops_number=local_crops_number,
            blur_kernel_size=3,
        ),
        "schedules": Schedules(warmup_epochs=1, teacher_temp_warmup_epochs=1),
    }
    return kind(**defaults | options)


def make_batch(recipe: DINOv2, size: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    images = Noise(size)
    samples = [(recipe.crops(images.read(index)), -1) for index in range(size)]
    return Collate(recipe.masks, recipe.grid)(samples, torch.Generator().manual_seed(seed))


def to_double(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
