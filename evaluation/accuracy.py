"""Top-k accuracy, counted batch by batch.

Letters: B batch, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class CorrectCounts:
    """How many rows have their label among the k best scores, for each k; a k above C becomes C."""

    def __init__(self, num_classes: int, *, top: Sequence[int] = (1, 5)) -> None:
        self.top = {k: min(k, num_classes) for k in top}
        self.correct = dict.fromkeys(top, 0)
        self.total = 0

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Count one batch: scores [B, C], labels [B]."""
        best = scores.topk(max(self.top.values()), dim=1).indices
        hits = best == labels[:, None]
        for k, width in self.top.items():
            self.correct[k] += int(hits[:, :width].sum())
        self.total += len(labels)

    def percentages(self) -> dict[int, float]:
        """Percent by k, rounded through float32 as torchmetrics (and so DINOv2's files) has it."""
        return {
            k: torch.tensor(correct / max(self.total, 1)).item() * 100.0
            for k, correct in self.correct.items()
        }
