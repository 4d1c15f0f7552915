"""Nearest training images of some validation images, by class token."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.features.dataset import class_token, evaluating, normalize_rows
from evaluation.pictures.figures import grid, save
from evaluation.probes.neighbours import Neighbours, find_neighbours
from evaluation.progress import track
from evaluation.sample import spread
from utils.data.images import ImageDataset, Subset
from utils.data.loaders import evaluation_batches
from vit.backbone import Backbone

NUMBERS = "numbers: cosine similarity"
FRAMES = "; green frame: the same class, red: another"


def draw_neighbours(
    net: Backbone,
    train: ImageDataset,
    val: ImageDataset,
    path: Path,
    *,
    transform: Callable,
    num_queries: int = 8,
    k: int = 7,
    batch_size: int = 256,
    num_workers: int = 0,
    shown: bool = False,
) -> Path:
    """One row per validation image: it and its k nearest training images by class token.

    A green frame is a neighbour of the same label, a red one of another; no frame, no labels. One
    process draws the picture, reading all images itself.
    """
    queries = Subset(val, spread(len(val), num_queries))
    rows, found = (
        _class_tokens(net, data, transform, batch_size, num_workers, shown)
        for data in (train, queries)
    )
    neighbours = find_neighbours(found, rows, k=k)
    figure, axes = grid(len(queries), 1 + neighbours.indices.shape[1])
    axes[0][0].set_title("query", fontsize=9)
    axes[0][1].set_title("nearest training images", fontsize=9, loc="left")
    _draw_rows(axes, queries, train, neighbours)
    framed = any(axis.spines["top"].get_visible() for axis in axes.flat)
    figure.supxlabel(NUMBERS + (FRAMES if framed else ""), fontsize=8)
    return save(figure, path)


@torch.inference_mode()
def _class_tokens(
    net: Backbone,
    dataset: ImageDataset,
    transform: Callable,
    batch_size: int,
    num_workers: int,
    shown: bool,
) -> Tensor:
    """Normalised class tokens [N D] of all images, whatever other processes there are."""
    parts = []
    with evaluating(net) as device:
        batches = evaluation_batches(dataset, transform, batch_size, num_workers=num_workers)
        batches = track(
            batches,
            total=len(dataset),
            label="class tokens",
            size=lambda batch: len(batch[1]),
            shown=shown,
        )
        for images, _, _ in batches:
            parts.append(normalize_rows(class_token(net, images.to(device)).float().cpu()))
    return torch.cat(parts)


def _draw_rows(
    axes: np.ndarray, queries: ImageDataset, train: ImageDataset, neighbours: Neighbours
) -> None:
    for row, (similarities, indices) in enumerate(zip(*neighbours, strict=True)):
        axes[row][0].imshow(queries.read(row))
        label = queries.label(row)
        for column, (similarity, index) in enumerate(
            zip(similarities.tolist(), indices.tolist(), strict=True), start=1
        ):
            axis = axes[row][column]
            axis.imshow(train.read(index))
            axis.set_xlabel(f"{similarity:.3f}", fontsize=7, labelpad=4)
            if label is not None and label >= 0:
                colour = "tab:green" if train.label(index) == label else "tab:red"
                axis.spines[:].set(visible=True, color=colour, linewidth=3)
