"""The keep rate shrinks while the network trains (Liang et al. 2022, section 3.3)."""

import math
from dataclasses import dataclass

from utils.ranges import check_range, check_rate


@dataclass(frozen=True, kw_only=True)
class Shrink:
    """1 up to `start_epoch`, then along a cosine to the rate itself, for good, after `epochs`.

    highest: where the cosine begins.
    """

    start_epoch: float = 0
    epochs: float = 0
    highest: float = 1.0

    def __post_init__(self) -> None:
        check_range("shrink_start_epoch", self.start_epoch)
        check_range("shrink_epochs", self.epochs)
        check_rate("max_keep_rate", self.highest)

    def rate_at(self, rate: float, step: int, epoch_length: int) -> float:
        """The rate of a training step for one that ends at `rate`; epoch_length in steps.

        Where the cosine begins and ends is decided by whole epochs, as published. One that is over
        before its last epoch stays at the rate.
        """
        epoch = step // epoch_length
        if epoch < self.start_epoch:
            return 1.0
        if epoch >= self.start_epoch + self.epochs:
            return rate
        passed = (step - epoch_length * self.start_epoch) / (epoch_length * self.epochs)
        return rate + (self.highest - rate) * 0.5 * (1 + math.cos(math.pi * min(passed, 1.0)))
