"""Block-wise masks of patches (Bao et al. 2022, BEiT, algorithm 1) and the collation of a batch.

All randomness comes from the generator handed in. Letters in shapes: B images, N patches in a grid
of h x w, U rows of the buffer of masked patches.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinov2.fast_crops import STAGES
from utils.data.colour_plan import plan_colours
from utils.ranges import check_order, check_share

MIN_BLOCK = 4  # patches
MIN_ASPECT = 0.3
NUM_TRIES = 10


class MaskSampler:
    """Masks for a batch: a share of the images gets masks of evenly spread ratios, the rest none.

    sample_probability: share of images with a mask. ratio_min_max: least and greatest share of
    patches masked in one.
    """

    def __init__(
        self, *, sample_probability: float = 0.5, ratio_min_max: Sequence[float] = (0.1, 0.5)
    ) -> None:
        check_order("ratio_min_max", ratio_min_max, 0, 1)
        check_share("sample_probability", sample_probability)
        self.sample_probability = sample_probability
        self.ratio_min_max = (float(ratio_min_max[0]), float(ratio_min_max[1]))

    def intervals(self, num_images: int, num_patches: int) -> list[tuple[float, float]]:
        """For each image that gets a mask, the least and greatest number of patches to mask."""
        num_masked = int(num_images * self.sample_probability)
        edges = (torch.linspace(*self.ratio_min_max, num_masked + 1) * num_patches).tolist()
        return list(zip(edges[:-1], edges[1:], strict=True))

    def upperbound(self, num_images: int, num_patches: int) -> int:
        """Most patches a batch can have masked: the fixed length of its buffer."""
        return sum(int(high) for _, high in self.intervals(num_images, num_patches))

    def sample(self, num_images: int, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Masks [B N], in random order of the images."""
        seed = int(torch.randint(2**62, (), generator=generator))
        rng = random.Random(seed)  # far faster than a tensor for every number
        targets = [int(rng.uniform(*i)) for i in self.intervals(num_images, grid[0] * grid[1])]
        targets += [0] * (num_images - len(targets))
        rng.shuffle(targets)
        return torch.stack([block_mask(grid, target, rng).flatten() for target in targets])


def block_mask(
    grid: tuple[int, int], target: int, rng: random.Random, *, max_block: float | None = None
) -> Tensor:
    """A mask [h w] of rectangles: never more than `target` patches, sometimes one or two fewer.

    max_block: patches of the largest rectangle; half the grid, in whole rows, if not given.
    """
    height, width = grid
    max_block = height // 2 * width if max_block is None else max_block
    mask = torch.zeros(grid, dtype=torch.bool)
    count = 0
    while count < target:
        added = _add_block(mask, min(target - count, max_block), rng)
        if not added:
            break
        count += added
    return mask


def _add_block(mask: Tensor, most: float, rng: random.Random) -> int:
    """Mask one more rectangle, at most `most` new patches; returns their number, 0 if none fits."""
    height, width = mask.shape
    for _ in range(NUM_TRIES):
        area = rng.uniform(MIN_BLOCK, most)
        aspect = math.exp(rng.uniform(math.log(MIN_ASPECT), -math.log(MIN_ASPECT)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= height or w >= width:
            continue
        top, left = rng.randint(0, height - h), rng.randint(0, width - w)
        block = mask[top : top + h, left : left + w]
        added = h * w - int(block.sum())
        if 0 < added <= most:
            block.fill_(True)
            return added
    return 0


def mask_weights(masks: Tensor) -> Tensor:
    """For each masked patch of [B N], in order, 1 / number masked in its image."""
    per_image = 1 / masks.sum(dim=1, keepdim=True).clamp(min=1)
    return per_image.expand_as(masks)[masks]


class Collate:
    """Samples to a batch; crops come crop-major (crop 0 of all images, crop 1 of all, ...).

    The batch: global_crops [2B 3 S S], local_crops [nB 3 s s] (if any), masks [2B N], mask_indices
    [U] (flat positions of masked patches) and mask_weights [U]. U depends on the batch size alone,
    so shapes never change; unused rows point at patch 0 with weight 0. Where the colours are left
    to the device, crops are uint8, and global_colours and local_colours are their plans.
    """

    def __init__(self, masks: MaskSampler, grid: tuple[int, int]) -> None:
        self.masks = masks
        self.grid = grid

    def __call__(
        self, samples: Sequence[tuple[dict[str, Tensor], int]], generator: torch.Generator
    ) -> dict[str, Any]:
        """Batch of (crops, label) pairs; labels are not used."""
        crops = [sample[0] for sample in samples]
        batch: dict[str, Any] = {
            name: torch.stack([sample[name] for sample in crops], dim=1).flatten(0, 1)
            for name in crops[0]
        }
        for name in ("global_colours", "local_colours"):
            if name in batch:
                batch[name] = plan_colours(batch[name], STAGES)
        num_images = len(batch["global_crops"])
        masks = self.masks.sample(num_images, self.grid, generator)
        upperbound = self.masks.upperbound(num_images, self.grid[0] * self.grid[1])
        return batch | {"masks": masks} | padded_mask_rows(masks, upperbound)


def padded_mask_rows(masks: Tensor, upperbound: int) -> dict[str, Tensor]:
    """Indices and weights of the masked patches of [B N], padded to a fixed length."""
    indices = masks.flatten().nonzero().flatten()
    assert len(indices) <= upperbound, "more patches masked than the sampler allows"
    padding = (0, upperbound - len(indices))
    return {
        "mask_indices": torch.nn.functional.pad(indices, padding),
        "mask_weights": torch.nn.functional.pad(mask_weights(masks), padding),
    }
