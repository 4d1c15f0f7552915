"""Learning rate and weight decay of DeiT III as functions of the step."""

import math
from dataclasses import dataclass
from typing import Any

from utils.ranges import OutOfRange, check_range, check_word
from utils.schedules import Constant, Schedule, check_lr_scaling, peak_lr

SHAPES = ("cosine", "step")
UPDATES = ("every_step", "every_epoch", "one_epoch_late")


@dataclass(frozen=True, kw_only=True)
class EpochSchedule:
    """Warm-up along a line from `warmup_start` to `base`, then what `after_warmup` says.

    The time is in epochs: exact at every step, held over an epoch, or, one_epoch_late, held at the
    value of the epoch before.
    """

    base: float
    epoch_length: int
    warmup_epochs: float = 0.0
    warmup_start: float = 0.0
    update: str = "every_step"

    def __call__(self, step: int) -> float:
        """Value at a step."""
        if self.update == "every_step":
            return self.at_epoch(step / self.epoch_length)
        epoch = step // self.epoch_length
        return self.at_epoch(max(epoch - 1, 0) if self.update == "one_epoch_late" else epoch)

    def at_epoch(self, epoch: float) -> float:
        """Value after that many epochs."""
        if epoch < self.warmup_epochs:
            rise = (self.base - self.warmup_start) / self.warmup_epochs
            return self.warmup_start + epoch * rise
        return self.after_warmup(epoch)

    def after_warmup(self, epoch: float) -> float:
        """Value after that many epochs, those of the warm-up counted."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class EpochCosine(EpochSchedule):
    """A cosine over all epochs, the warm-up included, then `final`.

    At the end of the warm-up the rate is that of the cosine there, a little below `base` (timm's
    cosine scheduler without prefixed warm-up). With `cosine_after_warmup` the cosine begins where
    the warm-up ends, at `base`.
    """

    final: float
    epochs: float
    cosine_after_warmup: bool = False

    def after_warmup(self, epoch: float) -> float:
        """Value after that many epochs, those of the warm-up counted."""
        if epoch >= self.epochs:
            return self.final
        before = self.warmup_epochs if self.cosine_after_warmup else 0.0
        phase = math.cos(math.pi * (epoch - before) / (self.epochs - before))
        return self.final + 0.5 * (self.base - self.final) * (1 + phase)


@dataclass(frozen=True, kw_only=True)
class EpochSteps(EpochSchedule):
    """`base`, times `decay_rate` after every `decay_epochs` (timm's step scheduler)."""

    decay_epochs: float
    decay_rate: float

    def after_warmup(self, epoch: float) -> float:
        """Value after that many epochs, those of the warm-up counted."""
        return self.base * self.decay_rate ** (epoch // self.decay_epochs)


class Schedules:
    """Values and lengths in epochs; `build` turns them into functions of the step.

    lr: at the batch size that the rule `lr_scaling` is named after
    (`utils.schedules.scale_lr`). shape: of the learning rate, cosine (down to `min_lr`) or step
    (times `decay_rate` after every `decay_epochs`). update: every_step, every_epoch or
    one_epoch_late. cosine_after_warmup: see `EpochCosine`.

    Departs from DeiT: there the scheduler is stepped with the number of the epoch that has just
    ended, so that two epochs run at the warm-up's first value and all later ones late; a resume
    jumps ahead by an epoch. `one_epoch_late` gives the rates of an uninterrupted published run.
    """

    def __init__(
        self,
        *,
        lr: float = 3e-3,
        lr_scaling: str = "none",
        min_lr: float = 1e-5,
        warmup_epochs: float = 5,
        warmup_lr: float = 1e-6,
        weight_decay: float = 0.02,
        update: str = "every_step",
        cosine_after_warmup: bool = False,
        shape: str = "cosine",
        decay_epochs: float = 30,
        decay_rate: float = 0.1,
    ) -> None:
        check_lr_scaling(lr_scaling)
        check_word("update", update, UPDATES)
        check_word("shape", shape, SHAPES)
        values = {"lr": lr, "min_lr": min_lr, "warmup_lr": warmup_lr, "weight_decay": weight_decay}
        for key, value in {**values, "warmup_epochs": warmup_epochs}.items():
            check_range(key, value)
        if shape == "cosine" and min_lr > lr:
            raise OutOfRange(f"min_lr {min_lr:g} is more than lr {lr:g}")
        if warmup_epochs and warmup_lr > max(lr, 1e-6):  # the default, for rates below it
            raise OutOfRange(f"warmup_lr {warmup_lr:g} is more than lr {lr:g}")
        check_range("decay_epochs", decay_epochs, ends="()")
        check_range("decay_rate", decay_rate, 0, 1, ends="(]")
        self.lr = lr
        self.lr_scaling = lr_scaling
        self.min_lr = min_lr
        self.warmup_epochs = warmup_epochs
        self.warmup_lr = warmup_lr
        self.weight_decay = weight_decay
        self.update = update
        self.cosine_after_warmup = cosine_after_warmup
        self.shape, self.decay_epochs, self.decay_rate = shape, decay_epochs, decay_rate

    def build(self, *, epochs: float, epoch_length: int, batch_size: int) -> dict[str, Schedule]:
        """Functions of the step; epoch_length in steps, batch_size in images per step."""
        if self.warmup_epochs > epochs:
            raise OutOfRange(
                f"schedules.warmup_epochs {self.warmup_epochs} is more than the {epochs} epochs "
                "of the run"
            )
        final = 0.0 if self.shape == "step" else self.min_lr
        common: dict[str, Any] = {
            "base": peak_lr(self.lr, self.lr_scaling, batch_size, min_lr=final),
            "epoch_length": epoch_length,
            "warmup_epochs": self.warmup_epochs,
            "warmup_start": self.warmup_lr,
            "update": self.update,
        }
        lr: Schedule
        if self.shape == "step":
            lr = EpochSteps(decay_epochs=self.decay_epochs, decay_rate=self.decay_rate, **common)
        else:
            lr = EpochCosine(
                final=self.min_lr,
                epochs=epochs,
                cosine_after_warmup=self.cosine_after_warmup,
                **common,
            )
        return {"lr": lr, "weight_decay": Constant(self.weight_decay)}
