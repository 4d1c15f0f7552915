"""Write features and predictions of all ranks to one file each, as the published probe does."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from evaluation.segmentation.standardize import Standardizer
from evaluation.segmentation.store import PatchStore
from utils import distributed


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
