"""Pictures of what a net sees: PCA maps of its patches, also of turned images; nearest neighbours.

Letters: B images, h w grid of patches, D channels, K components.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from evaluation.features import evaluating, extract_features
from evaluation.neighbours import Neighbours, find_neighbours
from utils.data.images import ImageDataset, Subset
from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from utils.metrics import read_metrics
from utils.symmetry import invert, transform_image, transform_map
from vit.backbone import Backbone

SHOWN_RANGE = 2.3
"""Whitened components are shown from minus to plus this many standard deviations."""


@torch.no_grad()
def pca_colours(patches: Tensor, *, components: int = 3) -> Tensor:
    """First principal components of all patches together [B h w D] as colours in 0..1 [B h w K].

    Whitened; each component's sign is the one that makes its skewness positive, so that pictures of
    two runs can be compared.
    """
    rows = patches.flatten(0, -2).double()
    rows = rows - rows.mean(dim=0)
    covariance = rows.T @ rows / max(len(rows) - 1, 1)
    variances, directions = torch.linalg.eigh(covariance)
    variances, directions = variances.flip(0)[:components], directions.flip(1)[:, :components]
    scores = rows @ directions / variances.clamp_min(1e-12).sqrt()
    skewness = scores.pow(3).mean(dim=0) / scores.square().mean(dim=0).clamp_min(1e-12) ** 1.5
    scores = torch.where(skewness < 0, -scores, scores)
    colours = (scores / SHOWN_RANGE + 1) / 2
    return colours.clamp(0, 1).float().unflatten(0, patches.shape[:-1])


@torch.no_grad()
def draw_pca_maps(net: Backbone, images: Tensor, path: Path, *, element: str = "r") -> Path:
    """One row per image [B 3 H H]: image, its map, turned image, its map, that map turned back.

    The first and the last map of a row agree where the net is equivariant. One PCA serves all.
    """
    turned = transform_image(images, element)
    with evaluating(net) as device:
        found = [net.features(views.to(device))[0].patches for views in (images, turned)]
    patches = [maps.float().cpu() for maps in found if maps is not None]
    if len(patches) < 2:
        raise ValueError("this net gives no map of patches, so there is none to draw")
    colours, turned_colours = pca_colours(torch.cat(patches)).chunk(2)
    columns = {
        "image": visible(images),
        "PCA of patches": colours,
        f"image turned ({element})": visible(turned),
        "PCA of patches ": turned_colours,
        "turned back": transform_map(turned_colours, invert(element)),
    }
    figure, axes = _grid(len(images), len(columns))
    for column, (title, pictures) in enumerate(columns.items()):
        axes[0][column].set_title(title, fontsize=9)
        for row, picture in enumerate(pictures):
            axes[row][column].imshow(picture.numpy(), interpolation="nearest")
    return _save(figure, path)


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
) -> Path:
    """One row per validation image: it and its k nearest training images by class token.

    A green frame is a neighbour of the same label, a red one of another; no frame, no labels.
    """
    spread = torch.linspace(0, len(val) - 1, min(num_queries, len(val))).long().tolist()
    queries = Subset(val, spread)
    rows, found = (
        extract_features(net, data, transform=transform, batch_size=batch_size, shown=False)
        for data in (train, queries)
    )
    neighbours = find_neighbours(found.features, rows.features, k=k)
    figure, axes = _grid(len(spread), 1 + neighbours.indices.shape[1])
    axes[0][0].set_title("query", fontsize=9)
    axes[0][1].set_title("nearest training images", fontsize=9, loc="left")
    _draw_rows(axes, queries, train, neighbours)
    return _save(figure, path)


def draw_losses(logs: Mapping[str, Path], path: Path, *, key: str = "loss") -> Path:
    """One curve of `key` per run: name -> its metrics.jsonl."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name, log in logs.items():
        points = [(line["step"], line[key]) for line in read_metrics(log) if key in line]
        axis.plot([step for step, _ in points], [value for _, value in points], label=name)
    axis.set(xlabel="step", ylabel=key)
    axis.legend()
    return _save(figure, path)


def visible(images: Tensor) -> Tensor:
    """Undo ImageNet's normalisation: [B 3 H W] to [B H W 3] in 0..1."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.cpu() * std + mean).clamp(0, 1).movedim(1, -1)


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
            axis.set_xlabel(f"{similarity:.3f}", fontsize=7, labelpad=1)
            if label is not None and label >= 0:
                colour = "tab:green" if train.label(index) == label else "tab:red"
                axis.spines[:].set(visible=True, color=colour, linewidth=3)


def _grid(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    # A bare figure, not pyplot: no global state and no window system, whatever the user's settings.
    figure = Figure(figsize=(1.5 * columns, 1.55 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
