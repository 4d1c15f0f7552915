"""Schedules: pure functions of the optimiser step, saved nowhere, so a resumed run cannot disagree.

A schedule is anything callable as `schedule(step) -> float`, for every step from 0 on; beyond its
end it keeps its last value. Recipes give the training loop a dict of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from utils.ranges import OutOfRange, check_word

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float

    def __call__(self, step: int) -> float:
        """Value at a step."""
        return self.value


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A straight line from `start` at step 0 to `end` at step `num_steps - 1`, then `end`.

    With a single step the value is `start`.
    """

    start: float
    end: float
    num_steps: int

    def __call__(self, step: int) -> float:
        """Value at a step."""
        if step >= self.num_steps:
            return self.end
        return _line(self.start, self.end, step, self.num_steps)


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Warm-up along a line, then half a cosine from `base` to `final`, then `final`.

    The warm-up reaches `base` at its last step, `warmup_steps - 1`, and the cosine begins there
    again, so the peak comes twice (as in DINOv2); one of a single step is at `warmup_start`. The
    cosine would reach `final` at step `num_steps`, one after the last.
    """

    base: float
    final: float
    num_steps: int
    warmup_steps: int = 0
    warmup_start: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps > self.num_steps:
            raise ValueError(
                f"a warm-up of {self.warmup_steps} steps does not fit into {self.num_steps} steps"
            )

    def __call__(self, step: int) -> float:
        """Value at a step."""
        if step < self.warmup_steps:
            return _line(self.warmup_start, self.base, step, self.warmup_steps)
        if step >= self.num_steps:
            return self.final
        phase = (step - self.warmup_steps) / (self.num_steps - self.warmup_steps)
        return self.final + 0.5 * (self.base - self.final) * (1 + math.cos(math.pi * phase))


@dataclass(frozen=True)
class Frozen:
    """Zero for the first `num_steps` steps, then another schedule, unshifted."""

    schedule: Schedule
    num_steps: int

    def __call__(self, step: int) -> float:
        """Value at a step."""
        return 0.0 if step < self.num_steps else self.schedule(step)


LR_SCALINGS = ("sqrt_wrt_1024", "linear_wrt_256", "linear_wrt_512", "none")


def check_lr_scaling(rule: str) -> None:
    """ValueError for an unknown rule."""
    check_word("lr_scaling", rule, LR_SCALINGS)


def scale_lr(lr: float, rule: str, batch_size: int) -> float:
    """Learning rate at an effective batch size (images per optimiser step, over all GPUs)."""
    check_lr_scaling(rule)
    if rule == "none":
        return lr
    if rule == "sqrt_wrt_1024":
        return lr * math.sqrt(batch_size / 1024)
    return lr * batch_size / int(rule.removeprefix("linear_wrt_"))


def peak_lr(lr: float, rule: str, batch_size: int, *, min_lr: float) -> float:
    """`scale_lr`; OutOfRange where `min_lr` is above the scaled rate."""
    peak = scale_lr(lr, rule, batch_size)
    if min_lr > peak:
        raise OutOfRange(
            f"schedules.min_lr {min_lr:g} is more than the {peak:g} that lr_scaling={rule} makes "
            f"of schedules.lr {lr:g} at {batch_size} images a step"
        )
    return peak


def _line(start: float, end: float, step: int, num_steps: int) -> float:
    if step == num_steps - 1 and num_steps > 1:
        return end
    return start + step * ((end - start) / max(num_steps - 1, 1))
