"""Measure a net under rotations by any angle, which a grid of pixels does not allow exactly.

An image is cut to its inscribed disc, turned by bilinear interpolation, and cut again. Each error
has a control: the image turned there and back, which is changed by interpolation alone, twice
instead of once. An error far above its control is due to the net.
Letters: B images, H side in pixels, h w grid of patches, D channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation.features.dataset import evaluating
from evaluation.features.reading import features_of
from evaluation.progress import track
from evaluation.symmetry.equivariance import relative_error
from utils.ranges import check_range
from utils.symmetry import disc, rotate
from vit.backbone import Backbone, Features


class AngleError(NamedTuple):
    """Relative distances at one angle, and those of the control."""

    cls: float  # |f(R x) - f(x)| of the class token
    cls_control: float  # |f(R' R x) - f(x)|, R' the turn back
    patches: float | None  # |f(R x) - R f(x)| of the map of patches, inside the disc
    patches_control: float | None  # |R' R f(R' R x) - f(x)|: image and map both interpolated twice


def angles_of(step: float) -> list[float]:
    """Angles every `step` degrees below 360; none for step 0."""
    check_range("angle_step", step, 0, 180)
    return [index * step for index in range(round(360 / step + 0.5 - 1e-9))] if step else []


@torch.no_grad()
def angle_errors(
    net: Backbone, images: Tensor, angles: Sequence[float], *, shown: bool = False
) -> dict[float, AngleError]:
    """Errors of images [B 3 H H] by angle, in degrees counter-clockwise.

    Multiples of 90 degrees need no interpolation and are exact.
    """
    errors = {}
    with evaluating(net) as device:
        images = _cut(images.to(device))
        still = features_of(net, images)[0]
        for angle in track(angles, total=len(angles), label="angles", shown=shown):
            turned_images = _cut(rotate(images, angle))
            turned = features_of(net, turned_images)[0]
            control = features_of(net, _cut(rotate(turned_images, -angle)))[0]
            errors[angle] = _compare(still, turned, control, angle)
    return errors


def _cut(images: Tensor) -> Tensor:
    """Set images to zero, the mean colour of normalised images, outside the disc."""
    height, width = images.shape[-2:]
    return images * disc(height, width, device=images.device)


def _compare(still: Features, turned: Features, control: Features, angle: float) -> AngleError:
    cls = relative_error(turned.cls, still.cls), relative_error(control.cls, still.cls)
    if still.patches is None or turned.patches is None or control.patches is None:
        return AngleError(*cls, None, None)
    expected, found, there_and_back = (
        part.movedim(-1, 1) for part in (still.patches, turned.patches, control.patches)
    )
    # Leave out cells at the rim, which are interpolated with values from outside the disc.
    height, width = expected.shape[-2:]
    inside = disc(height, width, 1.0, device=expected.device)
    if not inside.any():  # of a map of 2 x 2: nothing is left to compare
        return AngleError(*cls, None, None)
    back = rotate(rotate(there_and_back, angle), -angle)
    patches = relative_error(found * inside, rotate(expected, angle) * inside)
    return AngleError(*cls, patches, relative_error(back * inside, expected * inside))
