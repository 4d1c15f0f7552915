"""Evaluate nets on digits that are turned by symmetries and by any angle.

Digits are on black, so the corners of a turned image are filled with black.
Letters: N images, V views of each, C classes, H side in pixels.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evaluation.features.dataset import device_of
from evaluation.progress import track
from evaluation.symmetry.equivariance import relative_error
from evaluation.symmetry.posthoc import answers
from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from utils.symmetry import SYMMETRIES, rotate, transform_image


class Judged(NamedTuple):
    """Results of one net on turned digits: accuracies in percent, relative errors of logits."""

    by_element: dict[str, float]  # accuracy
    errors: dict[str, float]  # |f(g x) - f(x)| / |f(x)|
    by_angle: dict[float, float]  # accuracy
    there_and_back: dict[float, float]  # accuracy on images turned and turned back: the control

    @property
    def figures(self) -> dict[str, float]:
        """The columns of the table; those of arbitrary angles only if any were measured."""
        between = [a for a in self.by_angle if a % 90]
        angles = {
            "any_angle": sum(self.by_angle[a] for a in between) / max(1, len(between)),
            "any_angle_control": sum(self.there_and_back[a] for a in between)
            / max(1, len(between)),
        }
        return {
            "upright": self.by_element["e"],
            "mean_of_eight": sum(self.by_element.values()) / len(self.by_element),
            "worst_element": min(self.by_element.values()),
            **(angles if between else {}),
            "equivariance_error": max(self.errors.values()),
        }


@torch.inference_mode()
def judge_views(
    nets: Mapping[str, Any],
    images: Tensor,
    labels: Tensor,
    angles: Sequence[float],
    *,
    shared: Collection[str] = (),
    batch_size: int = 64,
) -> dict[str, Judged]:
    """Evaluate every net on every view of images [N 3 H H]; `shared` as in `posthoc.answers`."""
    views: dict[tuple[str, Any], Callable[[Tensor], Tensor]] = {}
    for element in SYMMETRIES:
        views["element", element] = partial(transform_image, element=element)
    for angle in angles:
        if angle % 90:  # the others are among the elements
            views["angle", angle] = partial(turn, angle=angle)
            # Quarter turns are exact, so the way back is the same one for 30 and for 120 degrees.
            views["back", angle % 90] = partial(turn_and_back, angle=angle % 90)
    logits: dict[tuple[str, Any], dict[str, Tensor]] = {}
    tracked = track(
        views, total=len(views) * len(images), label="turned images", size=lambda _: len(images)
    )
    for view in tracked:
        parts = [
            answers(nets, views[view](part.to(device_of(next(iter(nets.values()))))), shared)
            for part in images.split(batch_size)
        ]
        logits[view] = {name: torch.cat([part[name].cpu() for part in parts]) for name in nets}
    return {name: _judged({v: logits[v][name] for v in views}, labels, angles) for name in nets}


def _judged(
    logits: Mapping[tuple[str, Any], Tensor], labels: Tensor, angles: Sequence[float]
) -> Judged:
    def accuracy(view: tuple[str, Any]) -> float:
        return 100 * float((logits[view].argmax(dim=1) == labels).double().mean())

    quarters = {0: "e", 90: "r", 180: "rr", 270: "rrr"}
    still = logits["element", "e"]
    between = [angle for angle in angles if angle % 90]
    return Judged(
        {element: accuracy(("element", element)) for element in SYMMETRIES},
        {e: relative_error(logits["element", e], still) for e in SYMMETRIES},
        {a: accuracy(("angle", a) if a % 90 else ("element", quarters[int(a)])) for a in angles},
        {angle: accuracy(("back", angle % 90)) for angle in between},
    )


def turn(images: Tensor, angle: float) -> Tensor:
    """Turn normalised images [... 3 H H] counter-clockwise, bilinear, filled with black."""
    black = black_like(images)
    return rotate(images - black, angle) + black


def turn_and_back(images: Tensor, angle: float) -> Tensor:
    """Images turned there and back: changed only by the interpolation of `turn`, twice."""
    return turn(turn(images, angle), -angle)


def shift(images: Tensor, pixels: int) -> Tensor:
    """Move normalised images to the right, filled with black."""
    moved = images.roll(pixels, dims=-1)
    moved[..., :pixels] = black_like(images)
    return moved


def black_like(images: Tensor) -> Tensor:
    """Black under ImageNet's normalisation [3 1 1]."""
    values = [-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    return torch.tensor(values, dtype=images.dtype, device=images.device)[:, None, None]
