"""Images per second read from disk, undecoded: from single files, one LMDB file, tar shards.

All three hold the same images, are read in the same random order, and are dropped from the system's
page cache before each turn. The rates are those of the scratch folder's file system.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from utils.data.encoded import EncodedImage
from utils.data.images import ImageFolder
from utils.data.lmdb import LmdbImages
from utils.data.lmdb_writer import write_lmdb
from utils.data.shard_writer import Writing
from utils.data.shards import TarShards

PER_FOLDER = 1000
SHARD_MB = 100.0


class Store(NamedTuple):
    """Images on disk in one form; `forget` drops them from the page cache, `read` reads all."""

    name: str
    forget: Callable[[], None]
    read: Callable[[], None]


@contextmanager
def stores(files: list[EncodedImage], count: int, scratch: str | None) -> Iterator[list[Store]]:
    """Stores of `count` images, repeats of the given ones, in `scratch` for a `with` block."""
    with TemporaryDirectory(prefix="octic_reading.", dir=scratch) as temporary:
        root = Path(temporary)
        for number in range(count):
            path = root / "folder" / f"{number // PER_FOLDER}" / f"{number:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[number % len(files)].data)
        folder = ImageFolder(root / "folder")
        write_lmdb(folder.root, root / "images.lmdb")
        written = Writing(folder.root, root / "shards", shard_mb=SHARD_MB).run()
        os.sync()  # pages that are not on disk yet cannot be dropped
        order = np.random.default_rng(0).permutation(count).tolist()
        lmdb, shards = LmdbImages(root / "images.lmdb"), TarShards(list(written))
        paths = [Path(folder.path(index)) for index in range(count)]

        def forget_lmdb() -> None:
            lmdb.close()
            _forget([Path(lmdb.file)])

        yield [
            Store("a file each", lambda: _forget(paths), _reader(folder, order)),
            Store("LMDB", forget_lmdb, _reader(lmdb, order)),
            Store("tar shards", lambda: _forget(list(written)), _reader(shards, order)),
        ]


def _reader(images: Any, order: list[int]) -> Callable[[], None]:
    def read() -> None:
        for index in order:
            images.read_bytes(index)

    return read


def _forget(paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
