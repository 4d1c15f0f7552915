"""The five quantities of DINOv2 that change with the step (Oquab et al. 2023, appendix B)."""

import math
from collections.abc import Sequence

from utils.ranges import OutOfRange, check_range
from utils.schedules import Cosine, Frozen, Linear, Schedule, check_lr_scaling, peak_lr


class Schedules:
    """Values and lengths in epochs; `build` turns them into functions of the step.

    lr: at the batch size that the rule `lr_scaling` is named after
    (`utils.schedules.scale_lr`). Pairs are (first, last) values: weight decay and teacher momentum
    follow half a cosine over the run; the teacher temperature follows a line over
    `teacher_temp_warmup_epochs`, then stays. Epochs may be fractions.
    """

    def __init__(
        self,
        *,
        lr: float = 4e-3,
        lr_scaling: str = "sqrt_wrt_1024",
        min_lr: float = 1e-6,
        warmup_epochs: float = 10,
        freeze_last_layer_epochs: float = 1,
        weight_decay: Sequence[float] = (0.04, 0.4),
        momentum: Sequence[float] = (0.992, 1.0),
        teacher_temp: Sequence[float] = (0.04, 0.07),
        teacher_temp_warmup_epochs: float = 30,
    ) -> None:
        check_lr_scaling(lr_scaling)
        lengths = {
            "warmup_epochs": warmup_epochs,
            "freeze_last_layer_epochs": freeze_last_layer_epochs,
            "teacher_temp_warmup_epochs": teacher_temp_warmup_epochs,
        }
        for key, value in {"lr": lr, "min_lr": min_lr, **lengths}.items():
            check_range(key, value)
        if min_lr > lr:
            raise OutOfRange(f"min_lr {min_lr:g} is more than lr {lr:g}")
        self.lr = lr
        self.lr_scaling = lr_scaling
        self.min_lr = min_lr
        self.warmup_epochs = warmup_epochs
        self.freeze_last_layer_epochs = freeze_last_layer_epochs
        self.weight_decay = _pair("weight_decay", weight_decay)
        self.momentum = _pair("momentum", momentum, high=1.0)
        self.teacher_temp = _pair("teacher_temp", teacher_temp, ends="()")
        self.teacher_temp_warmup_epochs = teacher_temp_warmup_epochs

    def build(self, *, epochs: float, epoch_length: int, batch_size: int) -> dict[str, Schedule]:
        """Functions of the step; epoch_length in steps, batch_size in images per step."""
        if self.warmup_epochs > epochs:
            raise OutOfRange(
                f"schedules.warmup_epochs {self.warmup_epochs} is more than the {epochs} epochs "
                "of the run"
            )
        total = round(epochs * epoch_length)
        lr = Cosine(
            base=peak_lr(self.lr, self.lr_scaling, batch_size, min_lr=self.min_lr),
            final=self.min_lr,
            num_steps=total,
            warmup_steps=round(self.warmup_epochs * epoch_length),
        )
        wd_first, wd_last = self.weight_decay
        m_first, m_last = self.momentum
        t_first, t_last = self.teacher_temp
        temp_steps = round(self.teacher_temp_warmup_epochs * epoch_length)
        return {
            "lr": lr,
            "last_layer_lr": Frozen(lr, round(self.freeze_last_layer_epochs * epoch_length)),
            "weight_decay": Cosine(base=wd_first, final=wd_last, num_steps=total),
            "momentum": Cosine(base=m_first, final=m_last, num_steps=total),
            "teacher_temp": Linear(start=t_first, end=t_last, num_steps=temp_steps),
        }


def _pair(
    name: str, values: Sequence[float], *, high: float = math.inf, ends: str = "[]"
) -> tuple[float, float]:
    if len(values) != 2:
        raise OutOfRange(f"{name} takes two values (first, last), not {list(values)}")
    for value in values:
        check_range(name, value, 0.0, high, ends=ends)
    return float(values[0]), float(values[1])
