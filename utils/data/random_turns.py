"""Images turned and mirrored at random, for trainings that shall know them in every position."""

import random
from typing import Any

from PIL import Image

from utils.data.colour_plan import finished
from utils.ranges import check_share, check_word

TURNS = ("any", "quarter")
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "nearest": Image.Resampling.NEAREST}
_QUARTERS = (
    None,
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_270,
)


class RandomTurn:
    """Turn a PIL image at random, mirror some of them, then augment it.

    augmentation: what comes afterwards; None leaves a PIL image. turns: by `any` angle, black
    coming in at the corners, or by `quarter` turns, which move pixels and nothing else. mirrored:
    the share of images that are mirrored, left to right. interpolation of `any` angle: `bilinear`
    or `nearest`. The randomness is that of `random`, which the loader seeds.
    """

    def __init__(
        self,
        *,
        augmentation: Any = None,
        turns: str = "any",
        mirrored: float = 0.5,
        interpolation: str = "bilinear",
    ) -> None:
        check_word("turns", turns, TURNS)
        check_word("interpolation", interpolation, RESAMPLING)
        check_share("mirrored", mirrored)
        self.augmentation, self.turns, self.mirrored = augmentation, turns, mirrored
        self.resample = RESAMPLING[interpolation]

    @property
    def input_size(self) -> int | None:
        """Pixels a side that the augmentation makes, if it tells."""
        return getattr(self.augmentation, "input_size", None)

    def __call__(self, image: Image.Image) -> Any:
        """Augment one image."""
        turned = self._turn(image)
        if random.random() < self.mirrored:
            turned = turned.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return turned if self.augmentation is None else self.augmentation(turned)

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the augmentation leaves to the device."""
        return finished(self.augmentation, batch)

    def _turn(self, image: Image.Image) -> Image.Image:
        if self.turns == "any":
            return image.rotate(random.uniform(0, 360), resample=self.resample)
        quarter = random.choice(_QUARTERS)
        return image if quarter is None else image.transpose(quarter)
