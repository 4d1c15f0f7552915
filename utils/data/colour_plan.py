"""Which colour operators act on which images of a batch, drawn in the workers, done on the device.

A worker draws a row of numbers per image; a plan sorts the rows of a batch by operator, so that
each operator runs once on exactly the images it was drawn for, and the device never has to be asked
how many these are.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.data import colours

JITTER = ("brightness", "contrast", "saturation", "hue")
STRENGTHS = (*JITTER, "greyscale", "blur", "solarize")  # columns of a draw; NaN: does not act
SLOTS = slice(len(STRENGTHS), len(STRENGTHS) + len(JITTER))  # which comes when, 0 to 3
WIDTH = SLOTS.stop
# Uniform numbers of an image in the order they are drawn in; those that sort the jitter follow.
_DRAWN = (*JITTER, "jitter acts", "greyscale acts", "blur", "blur acts", "solarize acts")
BLUR_RANGE = (0.1, 2.0)  # of its strength

Operator = Callable[[Tensor, Tensor], Tensor]
OPERATORS: dict[str, Operator] = {
    "brightness": colours.brightness,
    "contrast": colours.contrast,
    "saturation": colours.saturation,
    "hue": colours.hue,
    "greyscale": lambda images, _: colours.greyscale(images),
    "solarize": lambda images, _: colours.solarize(images),
}


def draw_colours(
    count: int,
    *,
    jitter: Sequence[float],
    jitter_probability: float | Sequence[float] = 1.0,
    greyscale_probability: float | Sequence[float] = 0.0,
    blur_probability: float | Sequence[float] = 0.0,
    solarize_probability: float | Sequence[float] = 0.0,
) -> np.ndarray:
    """Draws for `count` images, float32 [count WIDTH], from numpy's global generator.

    jitter: by how much brightness, contrast and saturation may change (factors in 1 +- it, not
    below 0), and the hue (shifts in +- it); 0 leaves that one out. All of them act or none, in an
    order drawn per image, as in torchvision's ColorJitter. Probabilities: one, or one per image.
    """
    numbers = np.random.random_sample((count, len(_DRAWN) + len(JITTER))).astype(np.float32)
    drawn = dict(zip(_DRAWN, numbers.T[: len(_DRAWN)], strict=True))
    *factors, hue = jitter
    ranges = {
        name: (max(0.0, 1 - by), 1 + by) for name, by in zip(JITTER[:-1], factors, strict=True)
    }
    ranges |= {"hue": (-hue, hue), "blur": BLUR_RANGE}
    jitters = drawn["jitter acts"] < jitter_probability
    acts = {name: jitters for name, by in zip(JITTER, jitter, strict=True) if by}
    acts["greyscale"] = drawn["greyscale acts"] < greyscale_probability
    acts["blur"] = drawn["blur acts"] < blur_probability
    acts["solarize"] = drawn["solarize acts"] < solarize_probability
    rows = np.full((count, WIDTH), np.nan, dtype=np.float32)
    for name, chosen in acts.items():
        strengths: np.ndarray | int = 1
        if name in ranges:
            low, high = ranges[name]
            strengths = low + (high - low) * drawn[name]
        rows[:, STRENGTHS.index(name)] = np.where(chosen, strengths, np.nan)
    rows[:, SLOTS] = numbers[:, len(_DRAWN) :].argsort(1).argsort(1)
    return rows


def plan_colours(draws: Tensor, stages: Sequence[str]) -> dict[str, Any]:
    """The plan of a batch from its draws [N WIDTH]; `stages` orders operators, `jitter` for four.

    Its keys: names of the steps and how many images each is for (lists), images and strengths of
    all steps, one after another (tensors).
    """
    steps: list[tuple[str, Tensor]] = []
    for stage in stages:
        if stage != "jitter":
            steps.append((stage, ~draws[:, STRENGTHS.index(stage)].isnan()))
            continue
        slots, acts = draws[:, SLOTS], ~draws[:, : len(JITTER)].isnan()
        for slot in range(len(JITTER)):
            steps += [
                (name, acts[:, column] & (slots[:, column] == slot))
                for column, name in enumerate(JITTER)
            ]
    found = [(name, chosen.nonzero().flatten()) for name, chosen in steps if chosen.any()]
    empty = torch.empty(0)
    return {
        "names": [name for name, _ in found],
        "counts": [len(rows) for _, rows in found],
        "rows": torch.cat([empty.long(), *(rows for _, rows in found)]),
        "strengths": torch.cat(
            [empty, *(draws[rows, STRENGTHS.index(name)] for name, rows in found)]
        ),
    }


def finished(augmentation: Any, batch: Any) -> Any:
    """The batch after what the augmentation leaves to the device; the same without `finish`."""
    finish: Callable[[Any], Any] | None = getattr(augmentation, "finish", None)
    return batch if finish is None else finish(batch)


class Colours(nn.Module):
    """The colour operators of an augmentation, run on whole batches on the device.

    `compile`, which the loop calls where networks are compiled, makes a kernel or two of every
    operator that works pixel by pixel, for any number of images of any size: three quarters of what
    a DINOv2 step launches besides its networks. A blur stays as it is.
    """

    def __init__(self, blur: Operator) -> None:
        super().__init__()
        self.operators: dict[str, Operator] = {"blur": blur}

    def forward(self, pixels: Tensor, plan: Mapping[str, Any]) -> Tensor:
        """Levels [N 3 H W] of uint8 images after the plan's steps (see `colour`)."""
        return colour(pixels, plan, self.operators)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the operators, each at its first use."""
        for name, operator in OPERATORS.items():
            self.operators[name] = torch.compile(operator, *args, dynamic=True, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Without compiled code: workers, which get a copy, colour nothing."""
        own = {name: f for name, f in self.operators.items() if name not in OPERATORS}
        return {**self.__dict__, "operators": own}


@torch.no_grad()
def colour(
    pixels: Tensor, plan: Mapping[str, Any], operators: Mapping[str, Operator] | None = None
) -> Tensor:
    """Levels 0 to 255 of uint8 images [N 3 H W] after the plan's steps, as float32.

    `operators` adds to those that need no further choice: a blur.
    """
    images = pixels.float()
    known = {**OPERATORS, **(operators or {})}
    strengths = plan["strengths"].split(plan["counts"])
    for name, rows, values in zip(
        plan["names"], plan["rows"].split(plan["counts"]), strengths, strict=True
    ):
        images[rows] = known[name](images[rows], values)
    return images
