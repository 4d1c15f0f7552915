"""The copies of an image under a group, and their inverse for maps of patches.

A group is written C<n> (n rotations), D<n> (n rotations and their mirror images) or `mirror`. Copy
t < n is turned by 360 t / n degrees counter-clockwise, copy n + t is the left-right mirror image of
copy t: D4 has the order of `utils.symmetry.SYMMETRIES`.

Letters in shapes: B images, C channels, H W height and width, h w grid of patches, D channels.
"""

import math
import re
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode

from utils.precision import at_least_float32
from utils.ranges import check_word
from utils.symmetry import SYMMETRIES, disc, interpolated, rotate

INTERPOLATIONS = ("bilinear", "nearest")
RECTANGULAR = ("refuse", "pad", "crop")


class Element(NamedTuple):
    """One symmetry: its angle in degrees counter-clockwise, then whether it mirrors."""

    angle: float
    mirrored: bool


class Exact(NamedTuple):
    """A symmetry of the square under which the copies only change places, and its name."""

    name: str


class CopyGroup:
    """Makes copies [B C H W] of images, one for each element of the group.

    fill: the value in the corners of a turned image, a number or one per channel, in the
    normalised space of the images. disc_mask: fill outside the inscribed circle of every copy.
    interpolation of angles between the quarter turns: `bilinear` within [0, 90) followed by an
    exact quarter turn, or `nearest` as published. rectangular: `refuse` or `pad` (with `fill`)
    images that cannot be turned by 90 degrees in place; `crop`, with `nearest` alone, cuts off what
    leaves the frame, as published, which keeps no quarter turn exact.
    Departs from the published transforms: they take the nearest pixel, whose ties break the exact
    symmetry of the quarter turns for n > 4, and run in float32 on the CPU whatever the images are.
    """

    def __init__(
        self,
        name: str,
        *,
        fill: float | Sequence[float] = 0.0,
        disc_mask: bool = False,
        interpolation: str = "bilinear",
        rectangular: str = "refuse",
    ) -> None:
        self.name = name
        self.num_rotations, self.mirrored = parse_group(name)
        check_word("interpolation", interpolation, INTERPOLATIONS)
        check_word("rectangular", rectangular, RECTANGULAR)
        if rectangular == "crop" and interpolation != "nearest":
            raise ValueError("rectangular=crop goes with interpolation=nearest alone")
        self.fill = _checked_fill(fill)
        self.disc_mask, self.interpolation = disc_mask, interpolation
        self.rectangular = rectangular
        angles = [360 * turn / self.num_rotations for turn in range(self.num_rotations)]
        mirrors = (False, True) if self.mirrored else (False,)
        self.copies = [Element(angle, mirrored) for mirrored in mirrors for angle in angles]

    def __len__(self) -> int:
        return len(self.copies)

    def __repr__(self) -> str:
        return (
            f"CopyGroup({self.name!r}, fill={self.fill}, disc_mask={self.disc_mask}, "
            f"interpolation={self.interpolation!r}, rectangular={self.rectangular!r})"
        )

    # Read by reports of equivariance (`evaluation.symmetry.equivariance.Group`).

    @property
    def elements(self) -> list[Exact]:
        """The symmetries of the square that permute the copies exactly."""
        if self.interpolation == "nearest" and self.num_rotations not in (1, 2, 4):
            # Ties of the nearest pixel are broken differently in the turned, or mirrored, image.
            return [Exact("e")]
        turns = math.gcd(self.num_rotations, 2 if self.rectangular == "crop" else 4)
        steps = [turn * 4 // turns for turn in range(turns)]
        return [
            Exact(name)
            for name, (quarters, mirrored) in SYMMETRIES.items()
            if quarters in steps and (self.mirrored or not mirrored)
        ]

    def action(self, element: object) -> list[list[float]]:
        """How an element mixes the channels of a map: not at all."""
        return [[1.0]]

    # Images.

    def prepare(self, images: Tensor) -> Tensor:
        """Images that every element maps onto themselves; ValueError for rectangles otherwise."""
        height, width = images.shape[-2:]
        if height != width and any(element.angle % 180 for element in self.copies):
            if self.rectangular == "refuse":
                raise ValueError(
                    f"{self.name} turns images by 90 degrees, so {height} x {width} pixels must be "
                    "square; rectangular=pad fills them up"
                )
            if self.rectangular == "pad":
                images = self._padded(images)
        return self._cut(images) if self.disc_mask else images

    def copy(self, images: Tensor, index: int) -> Tensor:
        """Copy `index` of prepared images [B C H W]."""
        angle, mirrored = self.copies[index]
        turned = self._rotated(images, angle)
        if self.disc_mask and angle % 90:
            turned = self._cut(turned)
        return turned.flip(-1) if mirrored else turned

    def all_copies(self, images: Tensor) -> Tensor:
        """All copies [B T C H W] of images [B C H W], on their device and in their dtype."""
        images = self.prepare(images)
        return torch.stack([self.copy(images, index) for index in range(len(self))], dim=1)

    # Maps of patches.

    def undo(self, patches: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """The map [B h w D] of copy `index` turned back, and the share [h w] it has of each cell.

        Both are interpolated where the angle is no quarter turn; the share is 1 elsewhere.
        """
        angle, mirrored = self.copies[index]
        if angle % 180 and patches.shape[1] != patches.shape[2]:
            raise ValueError("a cropped image cannot be turned back; use rectangular=pad")
        maps = patches.movedim(-1, 1)
        maps = maps.flip(-1) if mirrored else maps
        share = at_least_float32(maps.new_ones(1, 1, *maps.shape[-2:]))
        return rotate(maps, -angle).movedim(1, -1), rotate(share, -angle)[0, 0]

    def _rotated(self, images: Tensor, angle: float) -> Tensor:
        if angle % (90 if images.shape[-2] == images.shape[-1] else 180) == 0:
            return images.rot90(int(angle // 90), dims=(-2, -1))
        fill = self._filling(images)
        if self.interpolation == "bilinear":
            return rotate(images - fill, angle) + fill
        row, column = self._nearest(images, angle)
        return torch.where(row == 0, fill, images[..., row - 1, column - 1])

    @staticmethod
    def _nearest(images: Tensor, angle: float) -> Tensor:
        """Row and column, from 1, of the pixel that each pixel shows, 0 outside: int64 [2 H W].

        Found in float32 for every dtype, which decides where ties fall, as published.
        """
        lines = [torch.arange(1.0, size + 1, device=images.device) for size in images.shape[-2:]]
        places = torch.stack(torch.meshgrid(*lines, indexing="ij"))
        return interpolated(places, angle, InterpolationMode.NEAREST).long()

    def _filling(self, images: Tensor) -> Tensor:
        """The fill as [C 1 1] or [1 1 1]."""
        values = [self.fill] if isinstance(self.fill, float) else self.fill
        if len(values) not in (1, images.shape[-3]):
            raise ValueError(f"fill has {len(values)} values for {images.shape[-3]} channels")
        return torch.tensor(values, dtype=images.dtype, device=images.device)[:, None, None]

    def _cut(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        inside = disc(height, width, device=images.device)
        return torch.where(inside, images, self._filling(images))

    def _padded(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if (height - width) % 2:
            raise ValueError(
                f"{height} x {width} pixels cannot be padded about their centre: the sides differ "
                "by an odd number; crop a row or a column first"
            )
        side = max(height, width)
        square = self._filling(images).expand(*images.shape[:-2], side, side).clone()
        top, left = (side - height) // 2, (side - width) // 2
        square[..., top : top + height, left : left + width] = images
        return square


def _checked_fill(fill: float | Sequence[float]) -> float | list[float]:
    """ValueError for a colour that is neither a number nor one for each channel."""
    values = list(fill) if isinstance(fill, Iterable) and not isinstance(fill, str) else [fill]
    numbers = all(isinstance(v, Real) and not isinstance(v, bool) for v in values)
    if not (values and numbers and all(math.isfinite(v) for v in values)):
        raise ValueError(f"fill must be a number, or a list with one per channel, not {fill!r}")
    found = [float(v) for v in values]
    return found if isinstance(fill, Iterable) else found[0]


def parse_group(name: str) -> tuple[int, bool]:
    """Number of rotations and whether there are mirror images; ValueError for other names."""
    if name == "mirror":
        return 1, True
    match = re.fullmatch(r"([CD])(\d+)", str(name))
    if match is None or int(match[2]) < 1:
        raise ValueError(f"unknown group {name!r}; known: mirror, C1, C4, C8, D4, D8, ... (C, D)")
    return int(match[2]), match[1] == "D"


def group_name(n_rotations: int, flips: bool) -> str:
    """The group of the published options `n_rotations` and `flips`."""
    return f"{'D' if flips else 'C'}{n_rotations}"
