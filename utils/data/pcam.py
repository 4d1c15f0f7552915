"""PatchCamelyon as folders of images: pieces of lymph nodes, 96 x 96, with tumour or without.

    ROOT/train, ROOT/valid, ROOT/test, each with no_tumor/ and tumor/

Source: Veeling et al. 2018, "Rotation Equivariant CNNs for Digital Pathology".
"""

import os
from pathlib import Path

import numpy as np

from utils.data.images import ImageDataset, ImageFolder, Subset, existing_folder
from utils.errors import UserError

CLASSES = ("no_tumor", "tumor")
FOLDERS = {"train": "train", "val": "valid", "test": "test"}
OFFICIAL = {"train": 262_144, "val": 32_768, "test": 32_768}


def pcam(
    root: str | os.PathLike | None,
    *,
    split: str = "train",
    fraction: float = 1.0,
    check_size: bool = False,
) -> ImageDataset:
    """The split train, val (the folder valid) or test of PCam.

    fraction: of each class, every n-th image, n = round(1 / fraction). check_size: refuse a folder
    without the official number of images. UserError for what is missing or unknown.
    """
    if split not in FOLDERS:
        raise UserError(f"PCam has no split {split!r}; there are {', '.join(FOLDERS)}")
    if not 0 < fraction <= 1:
        raise UserError(f"fraction is {fraction}; it must lie above 0 and at most at 1")
    folder = Path(existing_folder(root)) / FOLDERS[split]
    lacking = [name for name in CLASSES if not (folder / name).is_dir()]
    if lacking:
        raise UserError(
            f"{folder} lacks {' and '.join(lacking)}; PCam is read from ROOT/train, ROOT/valid and "
            f"ROOT/test with {' and '.join(CLASSES)} in each"
        )
    images = ImageFolder(folder, classes=CLASSES)
    labels = images.labels
    assert labels is not None
    for label, name in enumerate(CLASSES):
        if not (labels == label).any():
            raise UserError(f"{folder / name} holds no image")
    if check_size and len(images) != OFFICIAL[split]:
        raise UserError(
            f"{folder} holds {len(images):,} images, not the official {OFFICIAL[split]:,}"
        )
    step = round(1 / fraction)
    if step == 1:
        return images
    chosen = [np.flatnonzero(labels == label)[::step] for label in range(len(CLASSES))]
    return Subset(images, np.sort(np.concatenate(chosen)))
