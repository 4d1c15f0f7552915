"""Masks laid over images: what was to be found beside what was.

Letters: H W height and width.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from evaluation.pictures.figures import grid, save
from utils.data.embedded import voc_palette

OPACITY = 0.6
TITLES = ("image", "ground truth", "prediction")
PALETTE = np.array(voc_palette(), dtype=np.float64).reshape(256, 3) / 255
LEGEND_COLUMNS = 4
MAX_NAMED = 40  # classes a legend has room for


def draw_segmentation(
    images: Sequence[Image.Image],
    masks: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    path: Path,
    *,
    class_names: Sequence[str],
    ignore: Sequence[int] = (),
) -> Path:
    """One row per image: it, its mask over it, the predicted mask over it; a legend below.

    Masks and predictions are labels [H W], each of any size; `class_names[label]` names them, in
    VOC's colours. Pixels whose ground truth is ignored stay bare in both, and so does label 0,
    whose black would hide the image. Raises ValueError where there is nothing to draw or the
    numbers differ.
    """
    if not images or not len(images) == len(masks) == len(predictions):
        raise ValueError(
            f"{len(images)} images, {len(masks)} masks and {len(predictions)} predictions; there "
            "must be one of each per row, and at least one row"
        )
    figure, axes = grid(len(images), len(TITLES), cell=2.2)
    for axis, title in zip(axes[0], TITLES, strict=True):
        axis.set_title(title, fontsize=9)
    found: set[int] = set()
    for row, image, mask, prediction in zip(axes, images, masks, predictions, strict=True):
        bare = np.isin(mask, list(ignore))
        found |= set(np.unique(mask[~bare]).tolist())
        row[0].imshow(image)
        row[1].imshow(overlay(image, mask, bare))
        own = _at_size(mask, prediction.shape)
        ignored = np.isin(own, list(ignore))
        found |= set(np.unique(prediction[~ignored]).tolist())
        row[2].imshow(overlay(image, prediction, ignored))
    _add_legend(figure, sorted(found - {0}), class_names, ignore)
    return save(figure, path)


def overlay(image: Image.Image, labels: np.ndarray, bare: np.ndarray) -> np.ndarray:
    """The image in the colours of `labels` [H W] except where `bare`: [H W 3] in 0..1."""
    width, height = image.size
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    labels, bare = _at_size(labels, (height, width)), _at_size(bare, (height, width))
    mixed = (1 - OPACITY) * pixels + OPACITY * PALETTE[labels]
    return np.where((bare | (labels == 0))[..., None], pixels, mixed)


def _at_size(labels: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Labels at height and width `size`, nearest."""
    if labels.shape == size:
        return labels
    picture = Image.fromarray(labels.astype(np.uint8))
    small = picture.resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.asarray(small).astype(labels.dtype)


def _add_legend(
    figure: Figure, labels: Sequence[int], class_names: Sequence[str], ignore: Sequence[int]
) -> None:
    def name(label: int) -> str:
        known = class_names[label] if label < len(class_names) else f"label {label}"
        return f"{label}, ignored" if label in ignore else known

    named = [
        Patch(facecolor=PALETTE[label], edgecolor="grey", label=name(label))
        for label in labels[:MAX_NAMED]
    ]
    if len(labels) > MAX_NAMED:
        named.append(Patch(facecolor="none", label=f"and {len(labels) - MAX_NAMED} more"))
    figure.legend(handles=named, loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=7)
