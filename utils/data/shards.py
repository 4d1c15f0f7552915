"""Images in tar shards of the WebDataset layout, read by number (`utils.data.shard_index`).

An image is one read from a shard that stays open, at a place that the index knows, so the samplers,
exact resuming and the probes work as with files on disk. Images come in the order of their paths
however the shards were shuffled: a run on shards is the run on the folder they were made of, where
no further dot in a name became an underscore (`utils.data.shard_plan`) and changed that order.
"""

import io
import os
import resource
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.data.imagenet import csv_rows
from utils.data.images import ImageDataset, ImageError, part_of, read_image
from utils.data.shard_files import WORDS, expand, shards_of_split
from utils.data.shard_index import ShardIndex, shard_index
from utils.errors import UserError

CLASS_FILE = "classes.txt"


class TarShards:
    """The images of some shards: one path, several, or a pattern such as `x-{000..146}.tar`.

    The class of an image is what its `.cls` says, else `label_key` of its `.json`, else the first
    folder of its path; there are no labels where no image has one of these, or with `labels=False`.
    Whole numbers are label indices; names are numbered as the class file has them, else as
    `classes` says, else as sorted. A class file has a line `class id,name` or `class id` for each
    class in label order; unless `class_file` names another, it is classes.txt beside the shards.
    image, label_key, index_folder: as of `shard_index`. UserError for whatever is missing or
    unclear, such as an image without label among others.
    """

    def __init__(
        self,
        shards: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        labels: bool = True,
        classes: Sequence[str] | None = None,
        class_file: str | os.PathLike | None = None,
        image: str | None = None,
        label_key: str = "label",
        index_folder: str | os.PathLike | None = None,
    ) -> None:
        self.shards = expand(shards)
        image = image.lower().removeprefix(".") if image else None
        self._index = shard_index(
            self.shards, image=image, label_key=label_key, index_folder=index_folder
        )
        self._files = _OpenFiles()
        self.class_ids: list[str] = []
        self.class_names: list[str] = []
        self.labels: np.ndarray | None = None
        self.sorts_classes = False  # neither shards nor a file number them
        self._set_labels(labels, classes, class_file)

    def __len__(self) -> int:
        return len(self._index.name)

    def __repr__(self) -> str:
        more = f" and {len(self.shards) - 1:,} more" if len(self.shards) > 1 else ""
        return f"TarShards({self.shards[0]}{more}: {len(self):,} images)"

    def read(self, index: int) -> Image.Image:
        """Decoded RGB image."""
        return read_image(io.BytesIO(self.read_bytes(index)), name=self.path(index))

    def read_bytes(self, index: int) -> bytes:
        """The image file as stored; `ImageError` names it and its shard."""
        start, size = int(self._index.offset[index]), int(self._index.size[index])
        data = b""
        try:
            file = self._files.get(self.shards[self._index.shard[index]])
            # pread shares no position: forked workers may use one open file.
            while len(data) < size:
                more = os.pread(file.fileno(), size - len(data), start + len(data))
                if not more:
                    raise ImageError(self.path(index), "its shard has become shorter")
                data = data + more if data else more
        except OSError as error:
            raise ImageError(self.path(index), error.strerror or type(error).__name__) from None
        return data

    def label(self, index: int) -> int | None:
        """Class index, or None without labels."""
        return None if self.labels is None else int(self.labels[index])

    def path(self, index: int) -> str:
        """The shard, and the path in it."""
        shard = self.shards[self._index.shard[index]]
        return f"{shard}:{os.fsdecode(self._index.name[index])}"

    def _set_labels(
        self,
        labels: bool,
        classes: Sequence[str] | None,
        class_file: str | os.PathLike | None,
    ) -> None:
        texts, from_folders = self._label_texts() if labels else (None, False)
        if texts is None:
            return
        rows = _read_classes(_class_file(self.shards, class_file))
        self.class_ids, self.class_names = [row[0] for row in rows], [row[1] for row in rows]
        values, inverse = np.unique(texts, return_inverse=True)
        found = [os.fsdecode(value) for value in values.tolist()]
        if not from_folders and all(text.removeprefix("-").isdecimal() for text in found):
            self.labels = values.astype(np.int64)[inverse]
            self._check_numbers()
            return
        if not rows:
            self.sorts_classes = True
            self.class_names = list(classes) if classes is not None else found
        names = self.class_ids or self.class_names
        known = {name: number for number, name in enumerate(names)}
        for number, text in enumerate(found):
            if text not in known:
                where = self.path(int((inverse == number).argmax()))
                raise UserError(
                    f"{where}: its class {text!r} is none of the {len(known)} known "
                    f"({', '.join(names[:5])}, ...)"
                )
        self.labels = np.array([known[text] for text in found], dtype=np.int64)[inverse]

    def _label_texts(self) -> tuple[np.ndarray | None, bool]:
        """What tells the class of each image, of all or of none, and whether it is a folder."""
        index = self._index
        for part, texts in ((".cls", index.cls), (".json", index.json), ("folder", None)):
            texts = _first_folders(index) if texts is None else texts
            lacking = texts == b""
            if lacking.all():
                continue
            if lacking.any():
                where = self.path(int(lacking.argmax()))
                raise UserError(
                    f"{int(lacking.sum()):,} of {len(index.name):,} images have no label ({part}), "
                    f"which others have, as {where}; data.labels=false reads none"
                )
            return texts, part == "folder"
        return None, False

    def _check_numbers(self) -> None:
        """Refuse labels that no class of the class file has, and folders that say otherwise."""
        assert self.labels is not None
        count, least, most = len(self.class_ids), self.labels.min(), self.labels.max()
        if least < 0:
            where = self.path(int(self.labels.argmin()))
            raise UserError(f"{where} has the label {least}; data.labels=false reads none")
        if not count:
            return
        if most >= count:
            where = self.path(int(self.labels.argmax()))
            raise UserError(f"{where} has the label {most}, the class file {count} classes")
        known = {os.fsencode(name): number for number, name in enumerate(self.class_ids)}
        folders, inverse = np.unique(_first_folders(self._index), return_inverse=True)
        told = np.array([known.get(folder, -1) for folder in folders.tolist()])[inverse]
        wrong = (told >= 0) & (told != self.labels)
        if wrong.any():
            first = int(wrong.argmax())
            raise UserError(
                f"{self.path(first)} has the label {self.labels[first]}, but the class file has "
                f"class {told[first]} for its folder; the two are of different data"
            )


def shards(
    root: str | os.PathLike | None = None,
    *,
    split: str = "train",
    train_shards: str | os.PathLike | Sequence[str] | None = None,
    val_shards: str | os.PathLike | Sequence[str] | None = None,
    val_fraction: float | None = None,
    labels: bool = True,
    class_file: str | os.PathLike | None = None,
    image: str | None = None,
    label_key: str = "label",
    index_folder: str | os.PathLike | None = None,
) -> ImageDataset:
    """The part train, val or test of a folder of shards, or of those that patterns name.

    val_fraction: val is this part of each class of train, and train is the others. Names of classes
    have the numbers of train in every part. Other keywords as of `TarShards`.
    """
    if split not in WORDS:
        raise UserError(f"no split {split!r} in shards; there are {', '.join(WORDS)}")
    given = {"train": train_shards, "val": val_shards}
    options: dict[str, Any] = {
        "labels": labels,
        "class_file": class_file,
        "image": image,
        "label_key": label_key,
        "index_folder": index_folder,
    }

    def part(name: str, **more: Any) -> TarShards:
        return TarShards(given.get(name) or shards_of_split(root, name), **options, **more)

    if val_fraction is not None and split != "test":
        if val_shards is not None:
            raise UserError("val_shards and val_fraction both say what to judge on; give one")
        return part_of(part("train"), split, val_fraction)
    images = part(split)
    if split != "train" and images.sorts_classes and (train_shards or root):
        return part(split, classes=part("train").class_names)
    return images


class _OpenFiles:
    """Files kept open by path; beyond a quarter of what a process may open, the oldest are not.

    A copy for another process starts with none.
    """

    def __init__(self) -> None:
        self._files: OrderedDict[str, io.FileIO] = OrderedDict()
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = 1024 if limit < 0 else max(8, min(1024, limit // 4))

    def __reduce__(self) -> tuple:
        return _OpenFiles, ()

    def __del__(self) -> None:
        for file in self._files.values():
            file.close()

    def get(self, path: str) -> io.FileIO:
        file = self._files.get(path)
        if file is None:
            file = io.FileIO(path)  # closed when nobody holds it any longer
            self._files[path] = file
            if len(self._files) > self._most:
                self._files.popitem(last=False)  # another thread may be reading it
        return file


def _first_folders(index: ShardIndex) -> np.ndarray:
    folders = [name.split(b"/", 1)[0] if b"/" in name else b"" for name in index.name.tolist()]
    return np.array(folders)


def _class_file(shards: Sequence[str], given: str | os.PathLike | None) -> Path | None:
    if given is not None:
        path = Path(given).expanduser()
        if not path.is_file():
            raise UserError(f"there is no class file {path}")
        return path
    folder = Path(shards[0]).parent
    split_folder = any(folder.name.lower() in words for words in WORDS.values())
    for place in (folder, folder.parent) if split_folder else (folder,):
        if (place / CLASS_FILE).is_file():
            return place / CLASS_FILE
    return None


def _read_classes(path: Path | None) -> list[tuple[str, str]]:
    """Class id and name of each label; empty without a file."""
    if path is None:
        return []
    rows = csv_rows(path)
    for number, row in enumerate(rows, start=1):
        if len(row) > 2:
            raise UserError(
                f"{path}, row {number}: {len(row)} columns instead of `class id,name`, or "
                "`class id`; a name with a comma needs quotes"
            )
    ids = [row[0] for row in rows]
    if len(set(ids)) < len(ids):
        raise UserError(f"{path}: a class id comes twice")
    return [(row[0], row[-1]) for row in rows]
