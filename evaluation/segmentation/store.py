"""Stores features and labels of patches, in memory or in a file that is read in chunks.

Each rank keeps the patches of its own images (rank, rank + world, ... of the list). A patch's
number is its place among those of all ranks: image by image, rows of the grid one after the other.
Letters: n patches of this rank, P patches of an image, p pixels a side of a patch, D width.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from utils import distributed
from utils.errors import UserError

FEATURE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class MemoryRows:
    """A matrix [n, D] as one tensor, written once and read in slices."""

    def __init__(self, count: int, dim: int, dtype: torch.dtype) -> None:
        self.rows = torch.empty(count, dim, dtype=dtype)

    def write(self, start: int, rows: Tensor) -> None:
        """Write rows, on any device and of any float type, at `start`."""
        self.rows[start : start + len(rows)] = rows.to(self.rows)

    def read(self, start: int, stop: int) -> Tensor:
        """A view of the rows [start, stop), which must not be modified."""
        return self.rows[start:stop]

    def close(self) -> None:
        """Free the memory."""
        self.rows = self.rows[:0].clone()


class FileRows:
    """A matrix [n, D] in an unnamed file in `folder`, which vanishes when the process ends.

    Reads copy, because a mapped file would count as memory of the process; and they are positional,
    because several readers would move a shared file position.
    """

    def __init__(self, count: int, dim: int, dtype: torch.dtype, folder: Path) -> None:
        self.dim, self.dtype = dim, dtype
        self.row_bytes = dim * dtype.itemsize
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file, name = tempfile.mkstemp(prefix=".patches.", dir=folder)
            os.unlink(name)
            os.posix_fallocate(self.file, 0, max(count * self.row_bytes, 1))
        except OSError as error:
            raise UserError(
                f"no room for {count * self.row_bytes / 1e9:.2f} GB of patch features in {folder}: "
                f"{error.strerror}; choose another scratch_dir, or feature_dtype=fp16 for half"
            ) from None

    def write(self, start: int, rows: Tensor) -> None:
        """Write rows, on any device and of any float type, at `start`."""
        data, offset = _bytes_of(rows.to("cpu", self.dtype).contiguous()), start * self.row_bytes
        while data:
            done = os.pwrite(self.file, data, offset)
            data, offset = data[done:], offset + done

    def read(self, start: int, stop: int) -> Tensor:
        """A copy of the rows [start, stop)."""
        rows = torch.empty(stop - start, self.dim, dtype=self.dtype)
        data, offset = _bytes_of(rows), start * self.row_bytes
        while data:
            done = os.preadv(self.file, [data], offset)
            assert done, "rows are read only after they were written"
            data, offset = data[done:], offset + done
        return rows

    def close(self) -> None:
        """Free the space on disk."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


class Shape(NamedTuple):
    """The numbers that determine the size of a store."""

    num_images: int  # of all ranks
    patches_per_image: int  # P
    pixels_per_patch: int  # p^2
    dim: int  # D


class PatchStore:
    """This rank's patches of one list of images; `folder` None keeps the features in memory."""

    def __init__(self, shape: Shape, *, dtype: torch.dtype, folder: Path | None) -> None:
        self.shape, self.dtype = shape, dtype
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.num_rows = self.num_own_images * shape.patches_per_image
        self.labels = torch.empty(self.num_rows, shape.pixels_per_patch, dtype=torch.uint8)
        self.patch_labels = torch.empty(self.num_rows, dtype=torch.uint8)
        self.rows: MemoryRows | FileRows = (
            MemoryRows(self.num_rows, shape.dim, dtype)
            if folder is None
            else FileRows(self.num_rows, shape.dim, dtype, folder)
        )

    @property
    def num_own_images(self) -> int:
        """Images of this rank."""
        return len(range(self.rank, self.shape.num_images, self.world))

    @property
    def total_rows(self) -> int:
        """Patches of all ranks."""
        return self.shape.num_images * self.shape.patches_per_image

    def write(self, start: int, features: Tensor, labels: Tensor, patch_labels: Tensor) -> None:
        """Write patches at this rank's places from `start` on."""
        share = slice(start, start + len(features))
        self.rows.write(start, features)
        self.labels[share], self.patch_labels[share] = labels, patch_labels

    def chunks(
        self,
        size: int,
        device: torch.device | str,
        *,
        keep: Tensor | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (features [m, D] float32 on `device`, own places [m]) of at most `size` patches.

        Patches where `keep` [n] is False are left out; `transform` is applied to the others.
        """
        for start in range(0, self.num_rows, size):
            stop = min(start + size, self.num_rows)
            places = torch.arange(start, stop)
            if keep is not None:
                places = places[keep[start:stop]]
                if not len(places):
                    continue
            features = self.rows.read(start, stop)
            if len(places) < stop - start:
                features = features[places - start]
            features = features.to(device, torch.float32)
            yield (transform(features) if transform else features), places

    def numbers(self, places: Tensor) -> Tensor:
        """Numbers, among the patches of all ranks, of this rank's places."""
        per_image = self.shape.patches_per_image
        images = places.div(per_image, rounding_mode="floor") * self.world + self.rank
        return images * per_image + places % per_image

    def own_places(self, numbers: Tensor) -> Tensor:
        """This rank's places of patch numbers; -1 if another rank has the patch."""
        per_image = self.shape.patches_per_image
        images = numbers.div(per_image, rounding_mode="floor")
        places = images.div(self.world, rounding_mode="floor") * per_image + numbers % per_image
        return places.where(images % self.world == self.rank, -1)

    def close(self) -> None:
        """Free memory and disk."""
        self.rows.close()


def _bytes_of(rows: Tensor) -> memoryview:
    return memoryview(rows.flatten().view(torch.uint8).numpy().data)
