"""Features on disk: one folder, written whole or not at all, and opened as a memory map.

    features.npy   float32 or float16 [N, D] or [N, ...]; np.load(..., mmap_mode="r") opens it
    labels.npy     int64 [N], -1 where there is none
    index.csv      row, image (number in the data set), path, label, class name, note; an image that
                   could not be read has no row, and the note says so
    meta.json      what the features are of: the net, the images, the transform, the precision

Each rank writes its rows to its own part; rank 0 joins the parts in the order of the data set and
renames the folder. Letters: N rows, D width.
"""

import csv
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils import distributed
from utils.data.images import ImageDataset
from utils.errors import UserError, one_line
from utils.proc import machine, started
from utils.ranges import check_word

FEATURES, LABELS, INDEX, META = "features.npy", "labels.npy", "index.csv", "meta.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
COLUMNS = ("row", "image", "path", "label", "class_name", "note")
BLOCK_BYTES = 2**26
"""Bytes that are read or joined at a time."""


class StoredFeatures(NamedTuple):
    """An opened folder of features; rows are ordered by the image's number in its data set."""

    folder: Path
    features: np.memmap  # [N, D] or [N, ...]
    labels: np.ndarray  # [N] int64, -1 where there is none
    images: np.ndarray  # [N] int64, ascending
    meta: dict[str, Any]

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, rows) for blocks of the rows from `start` to `stop`.

        Reads the file and not the memory map, whose pages would stay in the process's memory.
        """
        shape, dtype = self.features.shape[1:], self.features.dtype
        width = int(np.prod(shape))
        step = max(1, BLOCK_BYTES // max(1, width * dtype.itemsize))
        for first in range(start, stop, step):
            count = min(step, stop - first)
            offset = int(self.features.offset) + first * width * dtype.itemsize
            rows = np.fromfile(self.folder / FEATURES, dtype, count * width, offset=offset)
            yield first, torch.from_numpy(rows.reshape(count, *shape))


def open_features(folder: str | Path) -> StoredFeatures:
    """Open a folder of features; UserError, in one line, if it has none or is damaged."""
    folder = Path(folder)
    if not (folder / META).is_file():
        raise UserError(f"{folder} is no folder of features: it has no {META}")
    name = META
    try:
        meta = json.loads((folder / META).read_text())
        count, shape = int(meta["rows"]), tuple(meta["row_shape"])
        name = FEATURES
        features = np.load(folder / FEATURES, mmap_mode="r")
        name = LABELS
        labels = np.load(folder / LABELS)
        name = INDEX
        images = np.arange(count) if not meta["skipped"] else _read_images(folder / INDEX)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(
            f"{folder / name} is damaged ({one_line(error)}); extract the features again"
        ) from None
    if features.shape != (count, *shape) or labels.shape != (count,) or len(images) != count:
        raise UserError(
            f"{folder} is damaged: {META} tells of {count} rows of shape {list(shape)}, "
            f"{FEATURES} holds {list(features.shape)}, {LABELS} {list(labels.shape)}; extract again"
        )
    return StoredFeatures(folder, features, labels, images, meta)


def is_features(folder: str | Path) -> bool:
    """Whether a folder was written by this module, so that it may be replaced."""
    return (Path(folder) / META).is_file() and (Path(folder) / LABELS).is_file()


def differences(found: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """How stored features differ from those asked for: the key and both values of each."""
    lines = []
    for key, value in asked.items():
        if key == "on_error" and not found.get("skipped"):
            continue  # no image was left out, so the setting had no effect
        if found.get(key) != value:
            lines.append(f"{key} is {found.get(key)!r} there, {value!r} here")
    return lines


class FeatureWriter:
    """Writes one folder of features; every rank has its own writer, and all must `finish`.

    `folder` may hold older features, which are replaced at the end. The parts lie beside it in
    another folder, which must be visible to all ranks.
    """

    def __init__(self, folder: str | Path, *, dtype: str = "float32") -> None:
        check_word("dtype", dtype, DTYPES)
        self.folder, self.dtype = Path(folder), dtype
        mark = distributed.broadcast_object(f"{_here()}-{os.getpid()}")
        self.partial = self.folder.with_name(f".{self.folder.name}.{mark}.partial")
        self.rank = distributed.rank()
        self.row_shape: tuple[int, ...] = ()
        self.labels: list[np.ndarray] = []
        self.images: list[np.ndarray] = []
        if distributed.is_main():
            _remove_leftovers(self.folder)
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self._part(self.rank).open("wb")
        except OSError as error:
            raise UserError(f"cannot write features to {folder}: {error.strerror}") from None

    def add(self, rows: Tensor, labels: Tensor, images: Tensor) -> None:
        """Append rows with their labels and image numbers [n]; UserError if float16 overflows."""
        stored = rows.to(DTYPES[self.dtype])
        lost = rows.isfinite() & ~stored.isfinite()
        if lost.any():
            raise UserError(
                f"a feature of {float(rows[lost].abs().max()):.0f} does not fit {self.dtype}; "
                "use dtype=float32"
            )
        try:
            if not self.labels:
                self.row_shape = tuple(rows.shape[1:])
                _write_header(self._file, self.dtype, (0, *self.row_shape))
            stored.cpu().contiguous().numpy().tofile(self._file)
        except OSError as error:
            raise UserError(f"cannot write features to {self.folder}: {error.strerror}") from None
        self.labels.append(labels.cpu().numpy())
        self.images.append(images.cpu().numpy())

    def finish(self, dataset: ImageDataset, meta: Mapping[str, Any]) -> None:
        """Join the ranks' parts and put the folder in place; every rank must call this."""
        count = sum(len(labels) for labels in self.labels)
        if count:
            self._file.seek(0)
            _write_header(self._file, self.dtype, (count, *self.row_shape))
        self._file.close()
        empty = np.empty(0, dtype=np.int64)
        parts = distributed.gather_objects(
            (np.concatenate([empty, *self.labels]), np.concatenate([empty, *self.images]))
        )
        shapes = distributed.gather_objects(self.row_shape)
        if not any(len(labels) for labels, _ in parts):
            raise UserError(f"{dataset!r}: no image could be read, so there are no features")
        problem = ""
        if distributed.is_main():
            try:
                self._join(parts, max(shapes), dataset, meta)
            except OSError as error:
                problem = f"cannot write features to {self.folder}: {error.strerror}"
        if problem := distributed.broadcast_object(problem):
            raise UserError(problem)

    def abandon(self) -> None:
        """Remove what was written so far."""
        self._file.close()
        shutil.rmtree(self.partial, ignore_errors=True)

    def _part(self, rank: int) -> Path:
        return self.partial / f"part-{rank}.npy"

    def _join(
        self,
        parts: list[tuple[np.ndarray, np.ndarray]],
        row_shape: tuple[int, ...],
        dataset: ImageDataset,
        meta: Mapping[str, Any],
    ) -> None:
        labels, images = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
        order = images.argsort()
        counts = [len(part[0]) for part in parts]
        self._join_rows(counts, order, row_shape)
        np.save(self.partial / LABELS, labels[order])
        _write_index(self.partial / INDEX, dataset, images[order], labels[order])
        facts = {
            "rows": len(order),
            "row_shape": list(row_shape),
            "skipped": len(dataset) - len(order),
            "versions": {"torch": torch.__version__, "numpy": np.__version__},
        }
        (self.partial / META).write_text(json.dumps({**meta, **facts}, indent=2) + "\n")
        _put_in_place(self.partial, self.folder)

    def _join_rows(self, counts: list[int], order: np.ndarray, row_shape: tuple[int, ...]) -> None:
        filled = [rank for rank, count in enumerate(counts) if count]
        if len(filled) == 1 and bool((order[1:] > order[:-1]).all()):
            self._part(filled[0]).replace(self.partial / FEATURES)
        else:
            maps = {rank: np.load(self._part(rank), mmap_mode="r") for rank in filled}
            starts = np.cumsum([0, *counts[:-1]])
            rank_of = np.repeat(np.arange(len(counts)), counts)
            row_bytes = int(np.prod(row_shape)) * np.dtype(self.dtype).itemsize
            step = max(1, BLOCK_BYTES // max(1, row_bytes))
            with (self.partial / FEATURES).open("wb") as file:
                _write_header(file, self.dtype, (len(order), *row_shape))
                for first in range(0, len(order), step):
                    places = order[first : first + step]
                    block = np.empty((len(places), *row_shape), dtype=self.dtype)
                    for rank, rows in maps.items():
                        mine = rank_of[places] == rank
                        block[mine] = rows[places[mine] - starts[rank]]
                    block.tofile(file)
            del maps
        for rank in range(len(counts)):
            self._part(rank).unlink(missing_ok=True)


def _here() -> str:
    """A short name of this machine, as `utils.proc` tells them apart."""
    return hashlib.sha256(machine().encode()).hexdigest()[:12]


def _remove_leftovers(folder: Path) -> None:
    """Remove what writers of this folder left that were killed, if they ran here."""
    for leftover in folder.parent.glob(glob.escape(f".{folder.name}.{_here()}-") + "*.partial"):
        pid = leftover.name.removesuffix(".partial").rpartition("-")[2]
        if pid.isdecimal() and not started(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


def _write_header(file: BinaryIO, dtype: str, shape: tuple[int, ...]) -> None:
    """Write a .npy header, whose length does not depend on the number of rows."""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _write_index(path: Path, dataset: ImageDataset, images: np.ndarray, labels: np.ndarray) -> None:
    names = list(dataset.class_names)
    stored = dict(zip(images.tolist(), enumerate(labels.tolist()), strict=True))
    # File names are bytes; surrogateescape keeps those that are not valid UTF-8.
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for image in range(len(dataset)):
            row, label = stored.get(image, ("", dataset.label(image)))
            known = label is not None and label >= 0
            name = names[label] if known and label < len(names) else ""
            note = "" if image in stored else "could not be read, left out"
            writer.writerow((row, image, dataset.path(image), label if known else "", name, note))


def _read_images(path: Path) -> np.ndarray:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        numbers = [int(line["image"]) for line in csv.DictReader(file) if line["row"]]
    return np.array(numbers, dtype=np.int64)


def _put_in_place(partial: Path, folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        old = partial.with_name(f"{partial.name}.old")
        folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old)
    else:
        partial.rename(folder)
