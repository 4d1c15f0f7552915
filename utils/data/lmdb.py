"""Images in one LMDB file: the encoded bytes as they lay on disk, read without unpacking anything.

`utils.data.lmdb_layout` says what such a file holds. Written by

    python -m utils.data.lmdb FOLDER FILE

FOLDER is any folder of images, such as ROOT/train of an ImageNet tree; sub-folders are classes.
`utils.data.lmdb_writer` writes train.lmdb and val.lmdb of such a tree at once.
Needs the package lmdb (`pip install -e .[lmdb]`).
"""

import io
import json
import os
from typing import Any

import numpy as np
from PIL import Image

from utils.data.images import ImageError, read_image
from utils.data.lmdb_layout import VERSION, key_of, lmdb_package
from utils.errors import UserError


class LmdbImages:
    """Images of a file that `lmdb_writer` wrote: `file`, or `split`.lmdb in the folder `root`.

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
                f"no LMDB file was given for {split}; say which: data.{split}_file=FILE, or "
                "data.root=FOLDER of train.lmdb and val.lmdb"
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
        data = self._get(key_of(index))
        if data is None:
            raise ImageError(self.path(index), "missing in the LMDB file, which is damaged")
        return data

    def label(self, index: int) -> int | None:
        """Class index, or None without labels."""
        return None if self.labels is None else int(self.labels[index])

    def path(self, index: int) -> str:
        """The file, and the path the image had."""
        name = self._get(key_of(index) + b".name") or b"?"
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


# LMDB allows one environment per file and process, and none of another process: by file, the
# process that opened it and its environment.
_opened: dict[str, tuple[int, Any]] = {}


def _environment(file: str) -> Any:
    owner, environment = _opened.get(os.path.realpath(file), (None, None))
    if owner == os.getpid():
        return environment
    if environment is not None:
        environment.close()  # this fork's copy of its parent's
    lmdb = lmdb_package()
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


if __name__ == "__main__":
    from utils.data.lmdb_writer import main_of_folder  # late: whoever reads packs nothing

    main_of_folder()
