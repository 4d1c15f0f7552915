"""Exams for trained classifiers: images, a metric, and the logit columns of their classes.

Letters: C classes, N images, L labels of one image.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluation.probes.accuracy import check_labels
from evaluation.probes.class_metrics import check_metric, read_real_labels
from utils.data.classes import class_metadata, mismatch
from utils.data.images import ImageDataset, Subset
from utils.errors import UserError, one_line

HELD_OUT = "held-out tenth of train"  # the name of the exam that it is


class Exam(NamedTuple):
    """Images to evaluate heads on, with the metric and the classes."""

    name: str
    dataset: ImageDataset
    metric: str = "mean_accuracy"
    mapping: Tensor | None = None  # [columns] of the logits that the data set's classes are
    answers: Tensor | None = None  # [N L] padded with -1, where several classes may be right


class TestSet(NamedTuple):
    """A data set to evaluate on, as the user gives it: its mapping is a file not read yet."""

    name: str
    dataset: ImageDataset
    metric: str
    mapping: str | None


def name_tests(
    datasets: Sequence[Any] | Mapping[str, Any],
    metrics: Sequence[str],
    mappings: Sequence[str | None],
    *,
    metric: str,
) -> list[TestSet]:
    """Combine data sets with their metrics and mappings; those of a list are test1, test2, ...

    A single metric is for all, and `metric` is the default. ValueError if the numbers differ.
    """
    if not isinstance(datasets, Mapping):
        datasets = {f"test{number}": dataset for number, dataset in enumerate(datasets, 1)}
    if taken := {"linear", "val"} & datasets.keys():  # the validation set's own results
        raise ValueError(f"test_datasets: {min(taken)} is taken; give the set another name")
    wrong = [name for name, dataset in datasets.items() if not hasattr(dataset, "read")]
    if wrong:
        raise ValueError(f"test_datasets: {wrong[0]} is no data set but {datasets[wrong[0]]!r}")
    metrics = [check_metric(name) for name in metrics] or [metric]
    metrics = metrics * len(datasets) if len(metrics) == 1 else metrics
    mappings = list(mappings) or [None] * len(datasets)
    for what, given in (("test_metric_types", metrics), ("test_class_mappings", mappings)):
        if len(given) != len(datasets):
            raise ValueError(f"{len(given)} {what} for {len(datasets)} test_datasets")
    return [
        TestSet(*parts)
        for parts in zip(datasets, datasets.values(), metrics, mappings, strict=True)
    ]


def prepare_exam(
    test: TestSet, *, trained_on: ImageDataset, num_classes: int, real_labels: str | None = None
) -> Exam:
    """Read the files of an exam and check its labels against the classes of the heads.

    UserError if the labels mean other classes than those of `trained_on`, unless a mapping gives
    their columns.
    """
    name, dataset, metric, file = test
    mapping = None if file is None else read_mapping(file, num_classes)
    if metric == "imagenet_real_accuracy":
        if real_labels is None:
            raise UserError("imagenet_real_accuracy needs real_labels=FILE, Beyer's real.json")
        return Exam(name, dataset, metric, mapping, read_real_labels(real_labels, dataset))
    check_labels(dataset)
    wrong = mismatch(class_metadata(trained_on), dataset) if mapping is None else None
    if wrong:
        raise UserError(f"{name} has other classes than data.train: {wrong}")
    available = num_classes if mapping is None else len(mapping)
    assert dataset.labels is not None
    highest = int(dataset.labels.max())
    if highest >= available:
        raise UserError(
            f"{name} has images of class {highest}, but the heads tell only classes 0 to "
            f"{available - 1} apart"
        )
    return Exam(name, dataset, metric, mapping)


def read_mapping(path: str | Path, num_classes: int) -> Tensor:
    """Read columns of the logits from an .npy file, as int64; UserError for any other content."""
    try:
        columns = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"class mapping {path}: {one_line(error)}") from None
    is_list = isinstance(columns, np.ndarray) and columns.ndim == 1 and columns.size
    if not is_list or columns.dtype.kind not in "iu":
        raise UserError(f"class mapping {path}: must be a list of column numbers")
    if columns.min() < 0 or columns.max() >= num_classes:
        raise UserError(
            f"class mapping {path}: columns {columns.min()} to {columns.max()}, but the heads have "
            f"0 to {num_classes - 1}"
        )
    return torch.from_numpy(columns.astype(np.int64))


def count_classes(dataset: ImageDataset) -> int:
    """Number of classes of heads trained on `dataset`; UserError for images without labels."""
    check_labels(dataset)
    assert dataset.labels is not None
    return int(dataset.labels.max()) + 1


def split_tenth(dataset: ImageDataset) -> tuple[Subset, Subset]:
    """Every tenth image of each class, and the others; UserError if no class has ten images."""
    check_labels(dataset)
    assert dataset.labels is not None
    tenth = np.zeros(len(dataset), dtype=bool)
    for label in np.unique(dataset.labels):
        tenth[np.flatnonzero(dataset.labels == label)[9::10]] = True
    if not tenth.any():
        raise UserError(
            f"{dataset!r}: no class has the ten images of which one could choose the head; use "
            "select_on=val"
        )
    return Subset(dataset, np.flatnonzero(tenth)), Subset(dataset, np.flatnonzero(~tenth))
