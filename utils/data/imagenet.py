"""ImageNet as unpacked on disk, with or without the metadata ("extra") files of the DINOv2 code.

    ROOT/train/<class id>/<class id>_<n>.JPEG
    ROOT/val/<class id>/ILSVRC2012_val_<n, 8 digits>.JPEG
    ROOT/test/ILSVRC2012_test_<n, 8 digits>.JPEG
    ROOT/labels.txt (optional): lines `class id,name`
    EXTRA/{entries,class-ids,class-names}-{TRAIN,VAL}.npy and EXTRA/entries-TEST.npy

The metadata spare the listing of a million files at every start. Write them with

    python -m utils.data.imagenet ROOT EXTRA
"""

import csv
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from utils.command import Parser, as_command
from utils.data.images import ImageFiles, ImageFolder, class_folders, existing_folder
from utils.errors import UserError
from utils.folders import make_folder
from utils.whole_file import whole_file

SIZES = {"train": 1_281_167, "val": 50_000, "test": 100_000}
NO_CLASS = 2**32 - 1  # class_index of an image of the test split
HINT = "data.root=FOLDER, or the environment variable IMAGENET_PATH"

logger = logging.getLogger(__name__)


class ImageNetTree(ImageFiles):
    """A split of an ImageNet tree; images and classes have the same order with and without `extra`.

    Without `extra`, or where that folder lacks the files of the split, the tree is listed and its
    files may have any name and extension. Class names are those of labels.txt, else the class ids.
    The split test has no labels. `check_size` demands the official number of images. UserError for
    whatever is missing or wrong.
    """

    def __init__(
        self,
        root: str | os.PathLike | None,
        *,
        split: str = "train",
        extra: str | os.PathLike | None = None,
        check_size: bool = False,
    ) -> None:
        self.root = existing_folder(root, hint=HINT)
        self.split = _known_split(split)
        self._folder: ImageFolder | None = None
        self.class_ids: list[str] = []
        self.class_names: list[str] = []
        if extra is not None and _has_extra(os.path.expanduser(extra), split):
            self._read_extra(os.path.expanduser(extra))
        else:
            self._list_tree()
        if check_size and len(self) != SIZES[split]:
            raise UserError(
                f"{self!r}: the official split {split} has {SIZES[split]:,}; the tree is not "
                "complete (use check_size=false for a part of ImageNet)"
            )

    def __len__(self) -> int:
        return len(self._entries) if self._folder is None else len(self._folder)

    def __repr__(self) -> str:
        return f"ImageNetTree({self.root}, {self.split}: {len(self):,} images)"

    def path(self, index: int) -> str:
        """File of an image; with metadata, rebuilt from class id and number."""
        if self._folder is not None:
            return self._folder.path(index)
        number, _, class_id, _ = self._entries[index].item()
        return os.path.join(self.root, relative_path(self.split, class_id, number))

    def _read_extra(self, extra: str) -> None:
        entries = _load(extra, "entries", self.split, mmap_mode="r")
        if entries.dtype.names != ("actual_index", "class_index", "class_id", "class_name"):
            raise UserError(f"{_extra_file(extra, 'entries', self.split)} is no list of images")
        self._entries: np.ndarray = entries
        if self.split != "test":
            self.labels = entries["class_index"].astype(np.int64)
            self.class_ids = _load(extra, "class-ids", self.split).tolist()
            self.class_names = _load(extra, "class-names", self.split).tolist()
            counts = len(self.class_ids), len(self.class_names), int(self.labels.max(initial=-1))
            if counts[0] != counts[1] or counts[2] >= counts[0]:
                raise UserError(
                    f"the metadata of {self.split} in {extra} contradict one another: "
                    f"{counts[0]} class ids, {counts[1]} names, labels up to {counts[2]}"
                )

    def _list_tree(self) -> None:
        where = existing_folder(os.path.join(self.root, self.split), hint=HINT)
        if self.split == "test":
            self._folder = ImageFolder(where, labels=False)
            return
        # The classes of train count for val too, which may lack some of them.
        train = os.path.join(self.root, "train")
        self.class_ids = class_folders(train if os.path.isdir(train) else where)
        self._folder = ImageFolder(where, classes=self.class_ids)
        if self._folder.labels is None:
            raise UserError(
                f"the images of {where} lie in no class folders; ImageNet's val is sorted into "
                "folders of class ids first, and other folders of images are read with data=folder"
            )
        self.labels = self._folder.labels
        names = read_names(self.root)
        self.class_names = [names.get(class_id, class_id) for class_id in self.class_ids]


def write_extra(
    root: str | os.PathLike, extra: str | os.PathLike, splits: Iterable[str] | None = None
) -> list[str]:
    """Write the metadata of `splits` (all whose folder exists); returns the files, as paths.

    The split test is not listed: its metadata are the 100,000 official numbers. Files are replaced
    atomically. Raises UserError for a file whose name is not ImageNet's.
    Departs from DINOv2: where the rows of labels.txt are not those of the class folders, ids and
    names are kept whole, which are cut to the length of other rows there.
    """
    root = os.path.abspath(os.path.expanduser(root))
    extra = os.path.expanduser(extra)
    if splits is None:
        root = existing_folder(root, hint="ROOT")
        splits = [split for split in SIZES if os.path.isdir(os.path.join(root, split))]
        if not splits:
            raise UserError(f"{root} has none of the folders {', '.join(SIZES)}")
    make_folder(extra, "EXTRA")
    written = []
    for split in splits:
        arrays = _test_arrays() if _known_split(split) == "test" else _arrays(root, split)
        for name, array in arrays.items():
            written.append(_extra_file(extra, name, split))
            _save(written[-1], array)
    return written


def relative_path(split: str, class_id: str, number: int) -> str:
    """Where an image lies below the root."""
    if split == "train":
        return os.path.join("train", class_id, f"{class_id}_{number}.JPEG")
    return os.path.join(split, class_id, f"ILSVRC2012_{split}_{number:08d}.JPEG")


def read_names(root: str | os.PathLike) -> dict[str, str]:
    """Class id to name from ROOT/labels.txt; empty where there is no such file."""
    path = os.path.join(root, "labels.txt")
    if not os.path.exists(path):
        return {}
    rows = csv_rows(path)
    for number, row in enumerate(rows, start=1):
        if len(row) != 2:
            raise UserError(f"{path}, row {number}: {len(row)} columns instead of `class id,name`")
    return {class_id: name for class_id, name in rows}


def csv_rows(path: str | os.PathLike) -> list[list[str]]:
    """The rows of a CSV file that are not empty; UserError for one that is no UTF-8 text."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [row for row in csv.reader(file) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {os.fspath(path)}, text in UTF-8: {error}") from None


def _arrays(root: str, split: str) -> dict[str, np.ndarray]:
    where = existing_folder(os.path.join(root, split), hint="ROOT")
    images = ImageFolder(where)
    if images.labels is None:
        raise UserError(f"the images of {where} lie in no class folders")
    ids, names = images.class_names, read_names(root)
    train = os.path.join(root, "train")
    if os.path.isdir(train) and class_folders(train) != ids:
        logger.warning(
            "%s has other class folders than train; as published, the metadata number the folders "
            "of each split on its own, so the labels of the two do not agree",
            where,
        )
    rows = []
    for index, label in enumerate(images.labels.tolist()):
        number = _number(images.path(index), split, ids[label], root)
        rows.append((number, label, ids[label], names.get(ids[label], ids[label])))
    ids = ids[: int(images.labels.max()) + 1]
    id_array, name_array = np.array(ids), np.array([names.get(key, key) for key in ids])
    return {
        "entries": np.array(rows, dtype=_entry_dtype(*_entry_widths(ids, names))),
        "class-ids": id_array,
        "class-names": name_array,
    }


def _test_arrays() -> dict[str, np.ndarray]:
    entries = np.zeros(SIZES["test"], dtype=_entry_dtype("<U0", "<U0"))
    entries["actual_index"] = np.arange(1, SIZES["test"] + 1)
    entries["class_index"] = NO_CLASS
    return {"entries": entries}


def _entry_widths(ids: list[str], names: dict[str, str]) -> tuple[str, str]:
    """Types of the ids and names of entries, wide enough for the class folders' own.

    As in DINOv2 also for as many first rows of labels.txt, so that its files are met byte for byte.
    """
    first = list(names.items())[: len(ids)]
    own = [(class_id, names.get(class_id, class_id)) for class_id in ids]
    longest = (max(map(len, column)) for column in zip(*own, *first, strict=True))
    class_id, class_name = (f"<U{length}" for length in longest)
    return class_id, class_name


def _entry_dtype(class_id: str, class_name: str) -> list[tuple[str, str]]:
    numbers = [("actual_index", "<u4"), ("class_index", "<u4")]
    return [*numbers, ("class_id", class_id), ("class_name", class_name)]


def _number(path: str, split: str, class_id: str, root: str) -> int:
    digits = os.path.splitext(os.path.basename(path))[0].rpartition("_")[2]
    number = int(digits) if digits.isascii() and digits.isdecimal() else -1
    expected = os.path.join(root, relative_path(split, class_id, number))
    if path != expected or number >= 2**32:
        raise UserError(
            f"{path} is not named as ImageNet names images ({relative_path(split, class_id, 17)}); "
            "such a tree is read without metadata files"
        )
    return number


def _known_split(split: str) -> str:
    if split not in SIZES:
        raise UserError(f"no split {split!r} in ImageNet; there are {', '.join(SIZES)}")
    return split


def _has_extra(extra: str, split: str) -> bool:
    present = os.path.exists(_extra_file(extra, "entries", split))
    if not present:
        logger.warning(
            "no %s, so the tree is listed (to write it: python -m utils.data.imagenet ROOT EXTRA)",
            _extra_file(extra, "entries", split),
        )
    return present


def _extra_file(extra: str, name: str, split: str) -> str:
    return os.path.join(extra, f"{name}-{split.upper()}.npy")


def _load(extra: str, name: str, split: str, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    path = _extra_file(extra, name, split)
    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the metadata file {path}: {error}") from None


def _save(path: str, array: np.ndarray) -> None:
    try:
        with whole_file(Path(path)) as partial, partial.open("wb") as file:
            np.save(file, array)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


@as_command()
def main(argv: Sequence[str] | None = None) -> None:
    """Write the metadata of the tree ROOT to the folder EXTRA."""
    parser = Parser(prog="python -m utils.data.imagenet", description=main.__doc__)
    parser.add_argument("root", metavar="ROOT", help="of train, val and test")
    parser.add_argument("extra", metavar="EXTRA", help="made if it is not there")
    asked = parser.parse_args(argv)
    for path in write_extra(asked.root, asked.extra):
        print(path)


if __name__ == "__main__":
    main()
