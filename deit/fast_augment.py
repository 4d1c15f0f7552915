"""3-Augment for a busy device: the workers crop, the device colours.

The images of `deit.augment.ThreeAugment` with the same distribution.
"""

import random
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms import v2

from deit.augment import ThreeOptions
from utils.data import colours
from utils.data.colour_plan import STRENGTHS, Colours, draw_colours
from utils.data.encoded import EncodedImage, pixels_of
from utils.data.random_crops import CropKind, cut_crops

THREE = ("greyscale", "solarize", "blur")
STAGES = (*THREE, "jitter")
MAX_RADIUS = 2.0  # of the blur, in pixels


class FastThreeAugment(ThreeOptions):
    """An encoded image to uint8 pixels and colours drawn for it; `finish` colours the images.

    Keywords as of `deit.augment.ThreeOptions`.
    """

    takes_encoded = True

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.scale
        self.kind = CropKind(1, self.input_size, (float(low), float(high)))
        self.jitter = (*[self.color_jitter] * 3, 0.0)  # no hue
        self.simple = None
        if self.crop == "simple":
            self.simple = v2.Compose(
                [
                    v2.Resize(self.input_size, v2.InterpolationMode.BICUBIC, antialias=True),
                    v2.RandomCrop(self.input_size, padding=4, padding_mode="reflect"),
                    v2.RandomHorizontalFlip(self.flip_probability),
                ]
            )
        self.colours = Colours(partial(colours.pillow_blur, reach=colours.pillow_reach(MAX_RADIUS)))
        self.normal = torch.tensor(self.mean), torch.tensor(self.std)

    def __call__(self, image: EncodedImage | Image) -> dict[str, Tensor]:
        """{"images": uint8 [3 S S], "colours": a draw} of one image."""
        if self.simple is None:
            pixels = cut_crops(image, [self.kind], flip_probability=self.flip_probability)[0][0]
        else:
            whole = image.decode() if isinstance(image, EncodedImage) else pixels_of(image)
            pixels = self.simple(whole)
        draw = draw_colours(1, jitter=self.jitter, blur_probability=1.0)[0]
        blur = draw[STRENGTHS.index("blur")]
        for name in THREE:
            draw[STRENGTHS.index(name)] = np.nan
        if random.random() < self.three_probability:
            one = random.choice(THREE)
            draw[STRENGTHS.index(one)] = blur if one == "blur" else 1
        return {"images": pixels, "colours": torch.from_numpy(draw)}

    def finish(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with coloured, normalised images in place of uint8 ones and their plan."""
        done = dict(batch)
        levels = self.colours(done["images"], done.pop("colours"))
        mean, std = (v.to(levels.device, non_blocking=True) for v in self.normal)
        return done | {"images": colours.normalize(levels, mean, std)}
