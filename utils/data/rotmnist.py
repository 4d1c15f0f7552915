"""Rotated MNIST as it was published in 2007: text files, or the archive they come in.

    mnist_rotation_new.zip, or unpacked from it
    mnist_all_rotation_normalized_float_train_valid.amat   12,000 rows: 10,000 train, 2,000 val
    mnist_all_rotation_normalized_float_test.amat          50,000 rows

A row is 784 numbers, 28 x 28 row by row in [0, 1), and the label. Reading the text takes a while,
so that the bytes are kept beside it (`*.uint8.npy`) where the folder can be written to.

Source: Larochelle et al. 2007, "An Empirical Evaluation of Deep Architectures on Problems with Many
Factors of Variation".
"""

import contextlib
import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image

from utils.data.images import existing_folder
from utils.errors import UserError
from utils.whole_file import whole_file

SIDE = 28
WIDTH = SIDE * SIDE + 1
ARCHIVE = "mnist_rotation_new.zip"
MD5 = "0f9a947ff3d30e95cd685462cbf3b847"
FILES = {
    "train": "mnist_all_rotation_normalized_float_train_valid.amat",
    "val": "mnist_all_rotation_normalized_float_train_valid.amat",
    "test": "mnist_all_rotation_normalized_float_test.amat",
}
ROWS_AT_ONCE = 1000


class RotMnist:
    """The split train, val or test of rotated MNIST, 28 x 28 grey images held in memory as bytes.

    root: the folder of the text files, or of the archive, whose checksum is compared. num_train,
    num_val, num_test: how many rows there must be, first train, then val in one file. fraction: of
    the training images, drawn as the published runs on a part of them drew theirs. Pixels are
    multiplied by 256 and rounded. UserError for what is missing, cut short or no such text.
    """

    class_names = [str(digit) for digit in range(10)]

    def __init__(
        self,
        root: str | os.PathLike | None,
        *,
        split: str = "train",
        num_train: int = 10_000,
        num_val: int = 2_000,
        num_test: int = 50_000,
        fraction: float = 1.0,
    ) -> None:
        if split not in FILES:
            raise UserError(f"rotMNIST has no split {split!r}; there are {', '.join(FILES)}")
        if not 0 < fraction <= 1:
            raise UserError(f"fraction is {fraction}; it must lie above 0 and at most at 1")
        self.root, self.split = existing_folder(root), split
        rows = num_test if split == "test" else num_train + num_val
        first, count = {"train": (0, num_train), "val": (num_train, num_val)}.get(split, (0, rows))
        table = _load(Path(self.root), FILES[split], rows)[first : first + count]
        if split == "train" and fraction < 1:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).numpy()
            table = table[order[: max(1, int(count * fraction))]]
        self._pixels = table[:, :-1].reshape(-1, SIDE, SIDE)
        self.labels = table[:, -1].astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"RotMnist({self.root}, {self.split}: {len(self):,} images)"

    def read(self, index: int) -> Image.Image:
        """RGB image 28 x 28, its channels equal."""
        return Image.fromarray(self._pixels[index]).convert("RGB")

    def label(self, index: int) -> int | None:
        """The digit."""
        return int(self.labels[index])

    def path(self, index: int) -> str:
        """Folder, split and number, as images have no files of their own."""
        return f"{self.root} {self.split} {index}"


def _load(root: Path, name: str, rows: int) -> np.ndarray:
    """Pixels and label of every row [rows 785] uint8."""
    source = root / name
    source = source if source.is_file() else root / ARCHIVE
    if not source.is_file():
        raise UserError(f"{root} holds neither {name} nor {ARCHIVE}, from which it comes")
    kept = root / f"{name}.uint8.npy"
    if kept.is_file() and kept.stat().st_mtime >= source.stat().st_mtime:
        with contextlib.suppress(OSError, ValueError):
            table = np.load(kept, allow_pickle=False)
            if table.dtype == np.uint8 and table.shape == (rows, WIDTH):
                return table
    with _opened(source, name) as text:
        table = _parse(text, rows, f"{source} ({name})" if source.name == ARCHIVE else str(source))
    _keep(kept, table)
    return table


@contextlib.contextmanager
def _opened(source: Path, name: str) -> Iterator[IO[bytes]]:
    if source.name != ARCHIVE:
        with open(source, "rb") as file:
            yield file
        return
    with open(source, "rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() != MD5:
            raise UserError(
                f"{source} is damaged, cut short or another file: its md5 is not {MD5}; "
                "download it again"
            )
    try:
        with zipfile.ZipFile(source) as archive, archive.open(name) as member:
            yield member
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise UserError(f"cannot read {name} in {source}: {error}") from None


def _parse(text: IO[bytes], rows: int, where: str) -> np.ndarray:
    table = np.empty((rows, WIDTH), dtype=np.uint8)
    done = 0
    while lines := list(islice(text, ROWS_AT_ONCE)):
        lines = [line for line in lines if line.strip()]
        if done + len(lines) > rows:
            raise UserError(f"{where} has more than the {rows:,} rows that it should have")
        for line in lines:
            table[done] = _row(line, f"{where}, row {done + 1}")
            done += 1
    if done != rows:
        raise UserError(f"{where} has {done:,} rows, not {rows:,}: is it cut short?")
    return table


def _row(line: bytes, where: str) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of text that ends in the middle of something else
            values = np.fromstring(line.decode("ascii"), dtype=np.float64, sep=" ")
    except (DeprecationWarning, ValueError):
        raise UserError(f"{where}: holds more than numbers") from None
    if len(values) != WIDTH:
        raise UserError(f"{where}: {len(values)} numbers, not {WIDTH} (28 x 28 and the label)")
    pixels, label = values[:-1], values[-1]
    if not (pixels.min() >= 0 and pixels.max() <= 1 and label in range(10)):
        raise UserError(f"{where}: pixels must lie in [0, 1] and the label be a digit")
    return np.append(np.rint(256 * pixels).clip(0, 255), label)


def _keep(path: Path, table: np.ndarray) -> None:
    """Write the bytes whole or not at all; a folder that cannot be written to goes without."""
    with contextlib.suppress(OSError), whole_file(path) as partial, partial.open("wb") as file:
        np.save(file, table)
