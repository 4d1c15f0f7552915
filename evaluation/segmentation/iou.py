"""Intersection over union and accuracy of labels per pixel, from one confusion matrix.

Letters: L = 256 labels, a mask's uint8.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from utils import distributed
from utils.errors import UserError

NUM_LABELS = 256


class Scores(NamedTuple):
    """Scores as fractions, over the pixels whose target is not ignored."""

    miou: float  # mean over the labels of targets or predictions: the published figure
    acc: float  # pixels predicted as their target
    miou_classes: float  # mean over the labels of targets alone
    class_iou: dict[int, float]  # label of a target -> IoU


class Confusion:
    """Counts [L, L] of pixels by target and prediction, summed batch by batch."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(NUM_LABELS, NUM_LABELS, dtype=torch.int64, device=device)

    def add(self, target: Tensor, prediction: Tensor) -> None:
        """Count pixels: two uint8 tensors of one shape, on any device."""
        if target.shape != prediction.shape:
            shapes = f"{tuple(target.shape)} and {tuple(prediction.shape)}"
            raise ValueError(f"targets and predictions differ in shape: {shapes}")
        device = self.counts.device
        pairs = target.to(device).flatten().int() * NUM_LABELS + prediction.to(device).flatten()
        self.counts += pairs.bincount(minlength=NUM_LABELS**2).view(NUM_LABELS, NUM_LABELS)

    def scores(self, ignore_labels: Sequence[int]) -> Scores:
        """Figures over the pixels of all ranks; every rank must call this.

        As published (scikit-learn's macro Jaccard index over the pixels that count): a label that
        occurs only in predictions, even an ignored one, has IoU 0; a label that occurs in neither
        is left out. UserError if no pixel counts.
        """
        counts = distributed.all_reduce_sum(self.counts).to("cpu", copy=True)
        counts[list(ignore_labels)] = 0
        target, predicted, both = counts.sum(1), counts.sum(0), counts.diagonal()
        total = int(target.sum())
        if not total:
            raise UserError(
                f"no pixel counts: every one is labelled {' or '.join(map(str, ignore_labels))}, "
                "which are ignored"
            )
        union = target + predicted - both
        iou = both.double() / union.clamp_min(1)
        labels = target.nonzero().flatten().tolist()
        return Scores(
            miou=float(iou[union > 0].mean()),
            acc=int(both.sum()) / total,
            miou_classes=float(iou[labels].mean()),
            class_iou={label: float(iou[label]) for label in labels},
        )
