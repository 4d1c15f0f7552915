"""Extract patch tokens and the labels of their pixels into a store, in one pass.

Letters: B images, R resolution, H W their size, h w the grid, p pixels a side of a patch, D width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.features.dataset import check_finite, device_of, evaluating
from evaluation.features.reading import patch_tokens
from evaluation.progress import track_share
from evaluation.segmentation.dense_transforms import Pair, Pairs
from evaluation.segmentation.iou import NUM_LABELS
from evaluation.segmentation.store import PatchStore, Shape
from utils.data.loaders import evaluation_batches
from utils.data.segmentation import SegmentationDataset
from utils.data.segmentation_transforms import squash
from utils.errors import as_user_error
from vit.backbone import Backbone, check_whole_patches


def split_images(count: int, *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Training and validation images; the latter are the first tenth of a seeded permutation."""
    order = np.random.RandomState(seed).permutation(count).tolist()
    return order[count // 10 :], order[: count // 10]


def shape_of(net: Backbone, num_images: int, resolution: int) -> Shape:
    """The shape of a store; UserError if whole patches do not fill the image."""
    side = net.patch_size
    with as_user_error():
        check_whole_patches((resolution, resolution), side, "resolution")
    return Shape(num_images, (resolution // side) ** 2, side**2, net.embed_dim)


def resolve_precision(precision: str, net: Backbone) -> str:
    """The precision, where `auto` is bf16 on a GPU, as published, and fp32 elsewhere."""
    if precision != "auto":
        return precision
    return "bf16" if device_of(net).type == "cuda" else "fp32"


@torch.no_grad()
def extract_patches(
    net: Backbone,
    dataset: SegmentationDataset,
    order: Sequence[int],
    store: PatchStore,
    *,
    resolution: int,
    batch_size: int = 64,
    num_workers: int = 0,
    precision: str = "fp32",
    transform: Callable | None = None,
    label: str = "patches",
) -> None:
    """Fill the store with this rank's share of the images `order`; every rank must call this.

    `transform` of a pair (image, mask) replaces the published squashing.
    """
    chosen: Any = _Chosen(dataset, order)  # pairs stand where images do
    batches = evaluation_batches(
        chosen,
        transform or partial(_squash_pair, resolution=resolution),
        batch_size,
        num_workers=num_workers,
        rank=store.rank,
        world_size=store.world,
    )
    batches = track_share(
        batches, total=store.num_own_images, label=label, size=lambda batch: len(batch[1])
    )
    start = calls = 0
    with evaluating(net, precision) as device:
        for (images, masks), _, indices in batches:
            features = patch_tokens(net, images.to(device, non_blocking=True))
            labels = label_patches(masks, net.patch_size).flatten(0, 2)
            check_finite(features, indices, chosen)  # waits for the device, as the store would
            store.write(start, features.flatten(0, 2), labels, majority_labels(labels))
            start, calls = start + len(labels), calls + 1
        # A sharded net gathers its weights in every call, so all ranks must make the same number.
        images = torch.zeros(1, 3, resolution, resolution, device=device)
        share = -(-store.shape.num_images // store.world)
        for _ in range(-(-share // batch_size) - calls):
            patch_tokens(net, images)


def label_patches(masks: Tensor, patch_size: int) -> Tensor:
    """Masks [B H W] as labels [B h w p^2], the pixels of a patch row by row."""
    rows, columns = (side // patch_size for side in masks.shape[-2:])
    cells = masks.view(len(masks), rows, patch_size, columns, patch_size)
    return cells.permute(0, 1, 3, 2, 4).flatten(3)


def majority_labels(labels: Tensor) -> Tensor:
    """The most frequent label [n] of each row [n, pixels], uint8; the smallest on ties."""
    rows = torch.arange(len(labels))[:, None] * NUM_LABELS
    counts = (rows + labels).flatten().bincount(minlength=len(labels) * NUM_LABELS)
    smaller_first = torch.arange(NUM_LABELS - 1, -1, -1)
    ranked = counts.view(-1, NUM_LABELS) * NUM_LABELS + smaller_first
    return ranked.argmax(1).to(torch.uint8)  # no two are equal


class _Chosen(Pairs):
    """Some images of a data set, in a given order."""

    def __init__(self, dataset: SegmentationDataset, order: Sequence[int]) -> None:
        super().__init__(dataset)
        self.order = np.asarray(order, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.order)

    def read(self, index: int) -> Pair:
        return super().read(int(self.order[index]))

    def path(self, index: int) -> str:
        return super().path(int(self.order[index]))


def _squash_pair(pair: Pair, *, resolution: int) -> tuple[Tensor, Tensor]:
    image, mask = pair
    return squash(image, mask, resolution)
