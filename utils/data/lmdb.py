"""Images in one LMDB file: the encoded bytes as they lay on disk, read without unpacking anything.

    b"about"         json: version, count, class_names
    b"labels"        int64 little-endian [count]; absent without labels
    b"<number>"      bytes of an image file, number with nine digits
    b"<number>.name" its path below the folder it came from

Written by

    python -m utils.data.lmdb FOLDER FILE

FOLDER is any folder of images, such as ROOT/train of an ImageNet tree; sub-folders are classes.
`utils.data.lmdb_writer` writes train.lmdb and val.lmdb of such a tree at once.
Needs the package lmdb (`pip install -e .[lmdb]`).
"""

import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.data.images import ImageError, ImageFolder, read_image
from utils.data.packing import Packed, RateLines, packed_files, unwritable
from utils.errors import UserError
from utils.whole_file import whole_file

VERSION = 1
BATCH = 1000  # images per transaction
# A sparse file of the data's size and room for its tree; pages hold 4 KiB, so a small image wastes.
MAP_SLACK = 1.2
MAP_PER_IMAGE = 8192


class LmdbImages:
    """Images of a file that `write_lmdb` wrote: `file`, or `split`.lmdb in the folder `root`.

    Each process opens the file for itself, read-only. UserError for a file that is missing or
    another program's.
    """

    def __init__(
        self,
        file: str | os.PathLike | None = None,
        *,
        root: str | os.PathLike | None = None,
        split: str = "train",
    ) -> None:
        if not file and root:
            file = os.path.join(root, f"{split}.lmdb")
        if not file or not os.fspath(file):
            raise UserError(
                "no LMDB file was given; say which: data.train_file=FILE, or data.root=FOLDER of "
                "train.lmdb and val.lmdb"
            )
        self.file = os.path.abspath(os.path.expanduser(os.fspath(file)))
        if os.path.isdir(self.file):
            raise UserError(
                f"{self.file} is a folder; an LMDB file is one of those that "
                "python -m utils.data.lmdb FOLDER FILE writes"
            )
        if not os.path.isfile(self.file):
            raise UserError(f"there is no LMDB file {self.file}")
        about = self._about()
        self._count: int = about["count"]
        self.class_names: list[str] = about["class_names"]
        stored = self._get(b"labels")
        self.labels = None if stored is None else np.frombuffer(stored, "<i8").astype(np.int64)

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"LmdbImages({self.file}: {len(self):,} images)"

    def read(self, index: int) -> Image.Image:
        """Decoded RGB image."""
        return read_image(io.BytesIO(self.read_bytes(index)), name=self.path(index))

    def read_bytes(self, index: int) -> bytes:
        """The image file as stored."""
        if not 0 <= index < self._count:
            raise IndexError(f"image {index} of {self._count}")
        data = self._get(_key(index))
        if data is None:
            raise ImageError(self.path(index), "missing in the LMDB file, which is damaged")
        return data

    def label(self, index: int) -> int | None:
        """Class index, or None without labels."""
        return None if self.labels is None else int(self.labels[index])

    def path(self, index: int) -> str:
        """The file, and the path the image had."""
        name = self._get(_key(index) + b".name") or b"?"
        return f"{self.file}:{os.fsdecode(name)}"

    def close(self) -> None:
        """Close the file in this process; reading opens it again."""
        owner, environment = _opened.pop(os.path.realpath(self.file), (0, None))
        if environment is not None and owner == os.getpid():
            environment.close()

    def _about(self) -> dict[str, Any]:
        stored = self._get(b"about") or b"{}"
        try:
            about = json.loads(stored)
        except ValueError:
            about = {}
        if not isinstance(about, dict) or about.get("version") != VERSION:
            raise UserError(
                f"{self.file} was not written by this program: "
                "python -m utils.data.lmdb FOLDER FILE writes one"
            )
        return about

    def _get(self, key: bytes) -> bytes | None:
        with _environment(self.file).begin() as transaction:
            return transaction.get(key)


def write_lmdb(
    folder: str | os.PathLike,
    file: str | os.PathLike,
    *,
    classes: Sequence[str] | None = None,
    check: str = "none",
    num_threads: int = 8,
    shown: bool = False,
) -> int:
    """Copy the images of a folder into one file; returns how many.

    classes: as of `ImageFolder`. check, num_threads: as of `packing.packed_files`. shown: with
    lines of progress. The file appears when it is whole. UserError where it exists already, where
    the folder holds no images or a bad one, and where the disk is full.
    """
    lmdb = _package()
    images, target = ImageFolder(folder, classes=classes), Path(file).expanduser().absolute()
    if target.exists():
        raise UserError(f"{target} exists; choose another file or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        size = sum(os.path.getsize(images.path(index)) for index in range(len(images)))
        map_size = int(MAP_SLACK * size) + MAP_PER_IMAGE * len(images) + 2**24
        files = packed_files(images, range(len(images)), check=check, num_threads=num_threads)
        with (
            whole_file(target) as partial,
            lmdb.open(
                os.fspath(partial), subdir=False, map_size=map_size, lock=False
            ) as environment,
        ):
            _fill(environment, images, files, RateLines(target.name, len(images), shown=shown))
            environment.sync(True)
    except lmdb.Error as error:
        raise UserError(f"cannot write {target}: {error}") from None
    except OSError as error:
        raise unwritable(target, error) from None
    return len(images)


def _fill(
    environment: Any, images: ImageFolder, files: Iterator[Packed], progress: RateLines
) -> None:
    """Copy images, labels and what is told about them into an empty environment."""
    while batch := list(islice(files, BATCH)):
        with environment.begin(write=True) as transaction:
            for number, name, data in batch:
                transaction.put(_key(number), data)
                transaction.put(_key(number) + b".name", os.fsencode(name))
                progress.add()
    about = {"version": VERSION, "count": len(images), "class_names": images.class_names}
    with environment.begin(write=True) as transaction:
        transaction.put(b"about", json.dumps(about).encode())
        if images.labels is not None:
            transaction.put(b"labels", images.labels.astype("<i8").tobytes())


# LMDB allows one environment per file and process, and none of another process: by file, the
# process that opened it and its environment.
_opened: dict[str, tuple[int, Any]] = {}


def _environment(file: str) -> Any:
    owner, environment = _opened.get(os.path.realpath(file), (None, None))
    if owner == os.getpid():
        return environment
    if environment is not None:
        environment.close()  # this fork's copy of its parent's
    lmdb = _package()
    try:
        # With read-ahead: without, a photograph is twenty reads of 4 KiB each.
        environment = lmdb.open(file, subdir=False, readonly=True, lock=False)
        used = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    except lmdb.Error as error:
        raise UserError(f"{file} is no LMDB file: {error}") from None
    if os.path.getsize(file) < used:  # reading behind its end would kill the process
        environment.close()
        raise UserError(f"{file} is cut: it has {os.path.getsize(file):,} of {used:,} bytes")
    _opened[os.path.realpath(file)] = os.getpid(), environment
    return environment


def _package() -> Any:
    try:
        import lmdb
    except ImportError:
        raise UserError("LMDB files need the package lmdb: pip install lmdb") from None
    return lmdb


def _key(index: int) -> bytes:
    return b"%09d" % index


def main(argv: list[str]) -> None:
    """The command of the module's docstring."""
    if len(argv) != 2 or argv[0].startswith("-"):
        print("usage: python -m utils.data.lmdb FOLDER FILE", file=sys.stderr)
        raise SystemExit(2)
    try:
        print(f"{write_lmdb(*argv, check='header', shown=True):,} images in {argv[1]}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(sys.argv[1:])
