"""Features and predictions of all ranks in one file each, as the published probe writes them.

Letters: N patches of all images, D width, B images, h w grid of patches, p pixels a side of a
patch, R resolution.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from evaluation.segmentation.standardize import Standardizer
from evaluation.segmentation.store import PatchStore
from utils import distributed
from utils.errors import UserError


@torch.no_grad()
def dump_features(
    path: Path, stores: Mapping[str, PatchStore], standardizer: Standardizer, *, chunk_size: int
) -> None:
    """Write {"features": {split: float32 [N, D]}, "labels": {split: uint8 [N, p^2]}}; collective.

    All ranks must share the folder. Only one chunk is in memory at a time: the matrix is assembled
    in a file beside `path`, which rank 0 maps while it saves.
    """
    partial: list[Path] = []
    saved: dict[str, dict[str, Tensor]] = {"features": {}, "labels": {}}
    for name, store in stores.items():
        rows = standardizer.rotation
        width = store.shape.dim if rows is None else rows.shape[1]
        files = [path.with_suffix(f".{name}.partial{number}") for number in range(2)]
        partial += files
        for file in files if distributed.is_main() else ():
            file.touch()
        distributed.barrier()
        device = "cpu" if standardizer.mean is None else standardizer.mean.device
        for features, places in store.chunks(chunk_size, device, transform=standardizer):
            numbers = store.numbers(places)
            _write_rows(files[0], features.cpu(), numbers)
            _write_rows(files[1], store.labels[places], numbers)
        distributed.barrier()
        if distributed.is_main():
            count = store.total_rows
            pixels = store.shape.pixels_per_patch
            saved["features"][name] = _map(files[0], count, width, torch.float32)
            saved["labels"][name] = _map(files[1], count, pixels, torch.uint8)
    if distributed.is_main():
        torch.save(saved, path)
        for file in partial:
            file.unlink()


def gather_predictions(store: PatchStore, own: Tensor) -> Tensor:
    """All ranks' predictions [N, p^2] by patch number, on every rank; a collective call."""
    if store.world == 1:
        return own
    everyone = torch.zeros(store.total_rows, own.shape[1], dtype=torch.uint8)
    everyone[store.numbers(torch.arange(store.num_rows))] = own
    for block in everyone.split(65536):
        torch.distributed.all_reduce(block)  # every rank has zeros in the rows of the others
    return everyone


def read_predictions(path: str | Path, num_images: int) -> Tensor:
    """Predictions [B h w, p p] that a probe wrote, as maps of labels [B R R].

    UserError for another file, and for predictions of another number of images.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file of predictions; a segmentation probe leaves one")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make the reader raise almost anything
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a file of predictions ({reason})") from None
    cells = len(found) / num_images if isinstance(found, Tensor) and found.ndim == 2 else 0.5
    if cells != int(cells) or not all(_is_square(n) for n in (int(cells), found.shape[1])):
        raise UserError(f"{path}: these are no predictions of the patches of {num_images} images")
    grid, pixels = round(cells**0.5), round(found.shape[1] ** 0.5)
    patches = found.view(num_images, grid, grid, pixels, pixels)
    return patches.permute(0, 1, 3, 2, 4).reshape(num_images, grid * pixels, grid * pixels)


def _is_square(number: int) -> bool:
    return number > 0 and round(number**0.5) ** 2 == number


def _write_rows(path: Path, rows: Tensor, numbers: Tensor) -> None:
    """Write rows at the places of their numbers; consecutive rows are written at once."""
    row_bytes = rows.shape[1] * rows.dtype.itemsize
    breaks = (numbers.diff() != 1).nonzero().flatten().add(1).tolist()
    with path.open("r+b") as file:
        for start, stop in zip([0, *breaks], [*breaks, len(rows)], strict=True):
            file.seek(int(numbers[start]) * row_bytes)
            file.write(rows[start:stop].contiguous().numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())


def _map(path: Path, count: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(path), shared=True, size=count * width, dtype=dtype).view(-1, width)
