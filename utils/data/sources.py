"""Inside a loader's worker: requests become batches, with random numbers of their own."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Generator
from torch.utils.data import Dataset, default_collate

from utils.data.encoded import encoded_image
from utils.data.images import ImageDataset, ImageError
from utils.data.samplers import derive_seed
from utils.randomness import preserved_cpu_randomness, seed_cpu

MAX_REPLACEMENTS = 1000  # images tried in place of one, before all of them are taken for damaged

# One with an attribute `takes_encoded` gets the file before it is decoded, to do that itself.
Transform = Callable[[Any], Any]
Sample = tuple[Any, int]  # transformed image, label or -1
Collate = Callable[[list[Sample], Generator], Any]


class Request(NamedTuple):
    """What one batch consists of: indices, the seed of each sample, the seed of the collation."""

    indices: list[int]
    seeds: Sequence[tuple[int, ...]]
    collate_seed: tuple[int, ...] = ()


class Failure(NamedTuple):
    """An image that could not be read."""

    number: int  # index in the data set
    path: str
    reason: str


class TrainingSource(Dataset):
    """Training batches by request, with the failures met; None for a batch that cannot be had.

    Failures are returned, because an exception of a worker reaches the user in two tracebacks.
    """

    def __init__(
        self, dataset: ImageDataset, transform: Transform, collate: Collate, skip: bool
    ) -> None:
        self.dataset, self.transform, self.collate, self.skip = dataset, transform, collate, skip

    def __getitem__(self, request: Request) -> tuple[Any, list[Failure]]:
        failures: list[Failure] = []
        samples = []
        with preserved_cpu_randomness():  # without workers, they are those of the training
            for index, seed in zip(request.indices, request.seeds, strict=True):
                sample = self._sample_or_next(index, seed, failures)
                if sample is None:
                    return None, failures
                samples.append(sample)
            collate_seed = derive_seed(*request.collate_seed)
            seed_cpu(collate_seed)
            return self.collate(samples, Generator().manual_seed(collate_seed)), failures

    def _sample_or_next(
        self, index: int, seed: tuple[int, ...], failures: list[Failure]
    ) -> Sample | None:
        count = len(self.dataset)
        for offset in range(min(count, MAX_REPLACEMENTS) if self.skip else 1):
            place = (index + offset) % count
            sample = read_sample(self.dataset, self.transform, place, seed, failures)
            if sample is not None:
                return sample
        return None


class EvaluationSource(Dataset):
    """(images, labels, indices) by request, with the failures met; None where no image is left."""

    def __init__(self, dataset: ImageDataset, transform: Transform, skip: bool) -> None:
        self.dataset, self.transform, self.skip = dataset, transform, skip

    def __getitem__(self, request: Request) -> tuple[Any, list[Failure]]:
        failures: list[Failure] = []
        rows = []
        with preserved_cpu_randomness():
            for index, seed in zip(request.indices, request.seeds, strict=True):
                sample = read_sample(self.dataset, self.transform, index, seed, failures)
                if sample is not None:
                    rows.append((*sample, index))
                elif not self.skip:
                    return None, failures
        return (tuple(default_collate(rows)) if rows else None), failures


def read_sample(
    dataset: ImageDataset,
    transform: Transform,
    index: int,
    seed: tuple[int, ...],
    failures: list[Failure],
) -> Sample | None:
    """The image, transformed under `seed`, and its label; None after noting a failure."""
    encoded = getattr(transform, "takes_encoded", False)
    try:
        image = encoded_image(dataset, index) if encoded else dataset.read(index)
        seed_cpu(derive_seed(*seed))
        transformed = transform(image)
    except ImageError as error:
        failures.append(Failure(index, error.path, error.reason))
        return None
    label = dataset.label(index)
    return transformed, -1 if label is None else label
