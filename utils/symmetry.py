"""The eight symmetries of the square, acting on images, and turns by any angle.

An element is written `r..` (quarter turns counter-clockwise) or `m r..` (these turns, then a
left-right mirroring); `e` is none of them.
Letters: H W height and width.
"""

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from utils.precision import at_least_float32
from utils.ranges import check_word

SYMMETRIES: dict[str, tuple[int, bool]] = {
    "e": (0, False),
    "r": (1, False),
    "rr": (2, False),
    "rrr": (3, False),
    "m": (0, True),
    "mr": (1, True),
    "mrr": (2, True),
    "mrrr": (3, True),
}
"""Name -> (quarter turns, mirrored afterwards)."""


def transform_image(images: Tensor, element: str) -> Tensor:
    """Apply one symmetry to the last two dimensions of `images` [..., H, W]."""
    turns, mirrored = _parts(element)
    turned = images.rot90(turns, dims=(-2, -1))
    return turned.flip(-1) if mirrored else turned


def invert(element: str) -> str:
    """Name of the inverse: a mirrored element is its own inverse, a rotation turns back."""
    turns, mirrored = _parts(element)
    return element if mirrored else _name((4 - turns) % 4, False)


def compose(after: str, before: str) -> str:
    """Name of the element that applies `before`, then `after`."""
    turns_after, mirrored_after = _parts(after)
    turns_before, mirrored_before = _parts(before)
    # m r = r^-1 m: a turn that follows a mirror turns the other way when pulled in front of it.
    turns = turns_before + (-turns_after if mirrored_before else turns_after)
    return _name(turns % 4, mirrored_after != mirrored_before)


def transform_map(patches: Tensor, element: str) -> Tensor:
    """Apply one symmetry to a map of patches [B, h, w, D], channels untouched."""
    return transform_image(patches.movedim(-1, 1), element).movedim(1, -1)


def rotate(images: Tensor, angle: float) -> Tensor:
    """Turn images [... H W] counter-clockwise about their centre, filled with zeros.

    angle: in degrees. Whole quarter turns are exact; only the rest is interpolated (bilinear).
    """
    quarters, rest = divmod(angle % 360, 90)
    turned = interpolated(images, rest, InterpolationMode.BILINEAR) if rest else images
    return turned.rot90(int(quarters), dims=(-2, -1))


def interpolated(images: Tensor, angle: float, interpolation: InterpolationMode) -> Tensor:
    """Turn images [... H W] by interpolation alone, whatever the angle, filled with zeros."""
    # A grid in half precision would miss its pixels.
    wide = at_least_float32(images)
    return functional.rotate(wide, angle, interpolation=interpolation).to(images.dtype)


def disc(
    height: int, width: int, margin: float = 0.0, *, device: torch.device | None = None
) -> Tensor:
    """Which cells [H W] have their centre at least `margin` cells inside the inscribed circle."""
    rows, columns = (torch.arange(size, device=device) - (size - 1) / 2 for size in (height, width))
    radius = min(height, width) / 2 - margin
    return rows[:, None].square() + columns.square() <= radius**2


def _parts(element: str) -> tuple[int, bool]:
    check_word("symmetry", element, SYMMETRIES)
    return SYMMETRIES[element]


def _name(turns: int, mirrored: bool) -> str:
    return ("m" if mirrored else "") + "r" * turns or "e"
