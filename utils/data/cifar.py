"""CIFAR-10 and CIFAR-100 in their binary version: plain bytes, nothing that could execute.

    cifar-10-batches-bin/   data_batch_1.bin .. data_batch_5.bin, test_batch.bin, batches.meta.txt
    cifar-100-binary/       train.bin, test.bin, fine_label_names.txt, coarse_label_names.txt

A record is one label byte (CIFAR-100: coarse, fine) and 3072 bytes: 32 x 32 red, green, blue.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from utils.data.images import ImageDataset, Subset, existing_folder
from utils.errors import UserError

SIDE = 32
PIXELS = 3 * SIDE * SIDE


class _Version(NamedTuple):
    folder: str
    files: dict[str, list[str]]
    names: dict[str, str]  # level -> file of class names
    levels: tuple[str, ...]  # of the label bytes, in their order


VERSIONS = {
    10: _Version(
        "cifar-10-batches-bin",
        {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "val": ["test_batch.bin"]},
        {"fine": "batches.meta.txt"},
        ("fine",),
    ),
    100: _Version(
        "cifar-100-binary",
        {"train": ["train.bin"], "val": ["test.bin"]},
        {"fine": "fine_label_names.txt", "coarse": "coarse_label_names.txt"},
        ("coarse", "fine"),
    ),
}


class Cifar:
    """CIFAR's training (train) or test images (val), 32 x 32, held in memory as bytes.

    root: the unpacked folder, or the one it lies in. level: `fine`, or `coarse` for the 20 groups
    of CIFAR-100. UserError for what is missing, cut short, or in the pickled Python version.
    """

    def __init__(
        self,
        root: str | os.PathLike | None,
        *,
        version: int = 10,
        split: str = "train",
        level: str = "fine",
    ) -> None:
        if version not in VERSIONS:
            raise UserError(f"there is CIFAR-10 and CIFAR-100, no CIFAR-{version}")
        layout = VERSIONS[version]
        if split not in layout.files:
            raise UserError(f"CIFAR-{version} has no split {split!r}; there are train and val")
        if level not in layout.levels:
            raise UserError(
                f"CIFAR-{version} has no level {level!r}; known: {', '.join(layout.levels)}"
            )
        self.version, self.split = version, split
        self.root = _find(Path(existing_folder(root)), layout, version)
        self.class_names = _names(self.root / layout.names[level])
        width = len(layout.levels) + PIXELS
        records = [_read(self.root / name, width) for name in layout.files[split]]
        self._records = np.concatenate(records)  # [N width] uint8
        self.labels = self._records[:, layout.levels.index(level)].astype(np.int64)
        if int(self.labels.max()) >= len(self.class_names):
            raise UserError(f"{self.root}: label {self.labels.max()} has no name; damaged files?")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Cifar({self.root}, {self.split}: {len(self):,} images)"

    def read(self, index: int) -> Image.Image:
        """RGB image 32 x 32."""
        planes = self._records[index, -PIXELS:].reshape(3, SIDE, SIDE)
        return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))

    def label(self, index: int) -> int | None:
        """Class index."""
        return int(self.labels[index])

    def path(self, index: int) -> str:
        """Folder and number, as images have no files of their own."""
        return f"{self.root} {self.split} {index}"


def held_out(
    root: str | os.PathLike | None,
    *,
    version: int = 10,
    split: str = "train",
    level: str = "fine",
    num_val: int = 5_000,
) -> ImageDataset:
    """CIFAR with a validation set: the last `num_val` training images are val, the test set test.

    What is tuned or chosen on val can then be judged on images that nothing was chosen on.
    """
    if split == "test":
        return Cifar(root, version=version, split="val", level=level)
    images = Cifar(root, version=version, level=level)
    if split not in ("train", "val"):
        raise UserError(f"no split {split!r} of CIFAR held out; there are train, val and test")
    first = len(images) - num_val
    if not 0 < first < len(images):
        raise UserError(f"num_val is {num_val}, of {len(images):,} training images")
    return Subset(images, range(first) if split == "train" else range(first, len(images)))


def _find(root: Path, layout: _Version, version: int) -> Path:
    needed = [*layout.names.values(), *sum(layout.files.values(), [])]
    for folder in (root, root / layout.folder):
        if (folder / needed[-1]).exists() or (folder / needed[0]).exists():
            missing = [name for name in needed if not (folder / name).is_file()]
            if missing:
                raise UserError(f"{folder} lacks {', '.join(missing)} of CIFAR-{version}")
            return folder
    pickled = {"data_batch_1", "train", "meta"}
    for folder in (root, *(path for path in root.iterdir() if path.is_dir())):
        if pickled & {path.name for path in folder.iterdir() if path.is_file()}:
            raise UserError(
                f"{folder} is the Python version of CIFAR-{version}, whose pickles could execute "
                f"anything; get the binary version (cifar-{version}-binary.tar.gz)"
            )
    raise UserError(f"no binary version of CIFAR-{version} in {root} or {root / layout.folder}")


def _names(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the names of classes in {path}: {error}") from None


def _read(path: Path, width: int) -> np.ndarray:
    size = path.stat().st_size
    if size == 0 or size % width:
        raise UserError(f"{path} has {size} bytes, no multiple of the {width} of a record")
    return np.fromfile(path, dtype=np.uint8).reshape(-1, width)
