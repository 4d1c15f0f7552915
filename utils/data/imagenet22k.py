"""ImageNet-22k as one tar file per class, read through an index of byte offsets.

    ROOT/<class id>.tar
    EXTRA/entries.npy (class_index, class_id, start_offset, end_offset, filename)
    EXTRA/class-ids.npy

The index is read, not written.
"""

import functools
import io
import mmap
import os
import zlib

import numpy as np
from PIL import Image

from utils.data.images import ImageError, existing_folder, read_image
from utils.errors import UserError

TAR_HEADER = 512
GZIP_MAGIC = b"\x1f\x8b"


class ImageNet22k:
    """Images inside the tar files of the classes, decompressed where they are gzip data."""

    def __init__(self, root: str | os.PathLike | None, *, extra: str | os.PathLike) -> None:
        self.root = existing_folder(root)
        extra = os.path.expanduser(extra)
        try:
            self._entries = np.load(os.path.join(extra, "entries.npy"), mmap_mode="r")
            self.class_ids = np.load(os.path.join(extra, "class-ids.npy")).tolist()
            self.labels = self._entries["class_index"].astype(np.int64)
        except (OSError, ValueError, IndexError) as error:
            raise UserError(f"cannot read the index of ImageNet-22k in {extra}: {error}") from None
        self.class_names: list[str] = self.class_ids

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"ImageNet22k({self.root}: {len(self):,} images, {len(self.class_ids):,} classes)"

    def read(self, index: int) -> Image.Image:
        """Decoded RGB image."""
        return read_image(io.BytesIO(self.read_bytes(index)), name=self.path(index))

    def read_bytes(self, index: int) -> bytes:
        """The image file as stored, with the padding of the tar format."""
        entry = self._entries[index]
        try:
            tar = _open_tar(self._tar(index))
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise ImageError(
                self.path(index), getattr(error, "strerror", "") or str(error)
            ) from None
        data = tar[int(entry["start_offset"]) + TAR_HEADER : int(entry["end_offset"])]
        if data[:2] != GZIP_MAGIC:
            return data
        try:  # a decompressor object ignores the padding that follows the compressed data
            return zlib.decompressobj(wbits=31).decompress(data)
        except zlib.error as error:
            raise ImageError(self.path(index), f"damaged ({error})") from None

    def label(self, index: int) -> int:
        """Class index."""
        return int(self.labels[index])

    def path(self, index: int) -> str:
        """Tar file and member, as `file.tar:member`."""
        return f"{self._tar(index)}:{self._entries[index]['filename']}"

    def _tar(self, index: int) -> str:
        return os.path.join(self.root, f"{self._entries[index]['class_id']}.tar")


@functools.lru_cache(maxsize=16)
def _open_tar(path: str) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
