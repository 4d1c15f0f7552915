"""What all pictures share: bare figures with cells for images, images made visible, files.

Letters: B images, H W height and width, h w grid of patches.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from utils.folders import make_folder

DPI = 120


def grid(rows: int, columns: int, *, cell: float = 1.5) -> tuple[Figure, np.ndarray]:
    """A figure of rows x columns cells (`cell` inches a side) without ticks, and its axes."""
    # A bare figure, not pyplot: no global state and no window system, whatever the user's settings.
    figure = Figure(figsize=(cell * columns, (cell + 0.05) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> Path:
    """Write a figure, with the folders on the way to it; gives the path."""
    path = Path(path)
    make_folder(path.parent)
    figure.savefig(path, dpi=DPI)
    return path


def visible(images: Tensor) -> Tensor:
    """Undo ImageNet's normalisation: [B 3 H W] to [B H W 3] in 0..1."""
    images = images.cpu()
    mean, std = (
        torch.tensor(values, dtype=images.dtype)[:, None, None]
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (images * std + mean).clamp(0, 1).movedim(1, -1)
