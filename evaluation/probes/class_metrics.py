"""Accuracies of one or many classifiers, counted batch by batch, per image or per class.

The figures equal torchmetrics' (and so DINOv2's), including its rounding through float32.
Letters: H classifiers, B batch, C classes, L labels of one image, N images.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils import distributed
from utils.data.images import ImageDataset
from utils.errors import UserError, one_line

# DINOv2's names of the metrics.
METRICS = (
    "mean_accuracy",
    "mean_per_class_accuracy",
    "per_class_accuracy",
    "imagenet_real_accuracy",
)
TOP = (1, 5)
NO_LABEL = -1


class ClassCounts:
    """Counts correct answers by class and k, for images with one label each; a k above C becomes C.

    Each rank counts its own images, until `reduce` sums the counts.
    """

    def __init__(
        self,
        num_heads: int,
        num_classes: int,
        *,
        top: Sequence[int] = TOP,
        device: torch.device | str = "cpu",
    ) -> None:
        self.top = {k: min(k, num_classes) for k in top}
        zeros = torch.zeros(num_heads, num_classes, dtype=torch.int64, device=device)
        self.correct = {k: zeros.clone() for k in top}
        self.predicted = zeros
        self.total = zeros[0].clone()

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Count one batch: scores [H B C], labels [B]."""
        first, best = _best_classes(scores, max(self.top.values()))
        hits = (best == labels[:, None]).cumsum(-1)
        classes = labels.expand(len(scores), -1)
        for k, width in self.top.items():
            hit = (first == labels).long() if width == 1 else hits[..., width - 1]
            self.correct[k].scatter_add_(1, classes, hit)
        self.predicted.scatter_add_(1, first, torch.ones_like(first))
        self.total.scatter_add_(0, labels, torch.ones_like(labels))

    def reduce(self) -> None:
        """Sum the counts of all ranks; every rank must call this, once."""
        self.correct = {k: distributed.all_reduce_sum(counts) for k, counts in self.correct.items()}
        self.predicted = distributed.all_reduce_sum(self.predicted)
        self.total = distributed.all_reduce_sum(self.total)

    def fractions(self, metric: str = "mean_accuracy") -> dict[int, Tensor]:
        """Fraction correct by k: over images [H], the mean over classes [H], or by class [H C].

        The mean is over classes that have images. At k = 1, as in torchmetrics, a class without
        images counts as 0 for a classifier that predicts it.
        """
        return {k: self._fraction(metric, k, counts) for k, counts in self.correct.items()}

    def _fraction(self, metric: str, k: int, correct: Tensor) -> Tensor:
        if metric == "mean_accuracy":
            return correct.sum(-1) / self.total.sum().clamp(min=1)
        by_class = correct / self.total.clamp(min=1)
        if metric == "per_class_accuracy":
            return by_class
        counted = (self.total > 0).expand_as(by_class)
        if self.top[k] == 1:
            counted = counted | (self.predicted > 0)
        weights = counted.float()
        return (by_class * weights / weights.sum(-1, keepdim=True).clamp(min=1)).sum(-1)


class AnyMatchCounts:
    """Counts images with several right answers, any of which suffices; leaves out those without."""

    def __init__(
        self,
        num_heads: int,
        num_classes: int,
        *,
        top: Sequence[int] = TOP,
        device: torch.device | str = "cpu",
    ) -> None:
        self.top = {k: min(k, num_classes) for k in top}
        self.correct = {k: torch.zeros(num_heads, dtype=torch.int64, device=device) for k in top}
        self.total = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Count one batch: scores [H B C], labels [B L] padded with -1."""
        first, best = _best_classes(scores, max(self.top.values()))
        hits = (best[..., None] == labels[:, None, :]).any(-1)
        for k, width in self.top.items():
            hit = (first[..., None] == labels) if width == 1 else hits[..., :width]
            self.correct[k] += hit.any(-1).sum(-1)
        self.total += (labels != NO_LABEL).any(-1).sum()

    def reduce(self) -> None:
        """Add up the counts of all ranks; every rank must call this, once."""
        self.correct = {k: distributed.all_reduce_sum(counts) for k, counts in self.correct.items()}
        self.total = distributed.all_reduce_sum(self.total)

    def fractions(self, metric: str = "imagenet_real_accuracy") -> dict[int, Tensor]:
        """Fraction correct by k, [H]."""
        return {k: counts / self.total.clamp(min=1) for k, counts in self.correct.items()}


def make_counts(
    metric: str, num_heads: int, num_classes: int, *, device: torch.device | str = "cpu"
) -> ClassCounts | AnyMatchCounts:
    """The counts that a metric, by DINOv2's name, needs."""
    several = metric == "imagenet_real_accuracy"
    return (AnyMatchCounts if several else ClassCounts)(num_heads, num_classes, device=device)


def check_metric(metric: str, allowed: Sequence[str] = METRICS) -> str:
    """The metric itself; ValueError if it is not allowed."""
    if metric not in allowed:
        raise ValueError(f"unknown metric {metric!r}; known: {', '.join(allowed)}")
    return metric


def read_real_labels(path: str | Path, dataset: ImageDataset) -> Tensor:
    """All right answers for each image of ImageNet's val, int64 [N L] padded with -1.

    `path` is the JSON of Beyer et al. 2020 (arXiv 2006.07159): one list of class indices, possibly
    empty, for each of ILSVRC2012_val_00000001, ... UserError for any other file, and for images
    with other names.
    """
    try:
        answers = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"real_labels {path}: {one_line(error)}") from None
    if not isinstance(answers, list) or not all(_is_list_of_classes(row) for row in answers):
        raise UserError(f"real_labels {path}: must be a JSON list with a list of classes per image")
    rows = [answers[_number(dataset.path(i), len(answers)) - 1] for i in range(len(dataset))]
    labels = torch.full((len(rows), max(map(len, rows), default=0) or 1), NO_LABEL)
    for row, classes in zip(labels, rows, strict=True):
        row[: len(classes)] = torch.tensor(classes, dtype=torch.int64)
    return labels


def _number(path: str, count: int) -> int:
    found = re.search(r"_(\d+)$", Path(path).stem)
    number = int(found.group(1)) if found else 0
    if not 1 <= number <= count:
        raise UserError(
            f"{path}: real_labels holds {count} images, ILSVRC2012_val_00000001 being the first; "
            "this is none of them"
        )
    return number


def _is_list_of_classes(row: object) -> bool:
    return isinstance(row, list) and all(isinstance(c, int) and c >= 0 for c in row)


def _best_classes(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best class [...] and the k best [... k] of scores [... C].

    Among equal scores the first class is the best, as in torchmetrics; topk does not define it.
    """
    return scores.argmax(-1), scores.topk(k, dim=-1).indices
