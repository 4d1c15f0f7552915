"""3-Augment for a busy device: the workers crop, the device colours.

The images of `deit.augment.ThreeAugment` with the same distribution.
"""

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms import v2

from deit.augment import check_three
from utils.data import colours
from utils.data.colour_plan import STRENGTHS, Colours, draw_colours
from utils.data.encoded import EncodedImage, pixels_of
from utils.data.random_crops import CropKind, cut_crops
from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD

THREE = ("greyscale", "solarize", "blur")
STAGES = (*THREE, "jitter")
MAX_RADIUS = 2.0  # of the blur, in pixels


class FastThreeAugment:
    """An encoded image to uint8 pixels and colours drawn for it; `finish` colours the images.

    Keywords as of `deit.augment.ThreeAugment`.
    """

    takes_encoded = True

    def __init__(
        self,
        *,
        input_size: int = 224,
        crop: str = "random_resized",
        scale: Sequence[float] = (0.08, 1.0),
        flip_probability: float = 0.5,
        three_probability: float = 1.0,
        color_jitter: float = 0.3,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        check_three(
            input_size=input_size,
            crop=crop,
            scale=scale,
            flip_probability=flip_probability,
            three_probability=three_probability,
            color_jitter=color_jitter,
        )
        self.input_size = input_size
        self.kind = CropKind(1, input_size, (float(scale[0]), float(scale[1])))
        self.flip_probability, self.three_probability = flip_probability, three_probability
        self.jitter = (color_jitter, color_jitter, color_jitter, 0.0)
        self.simple = None
        if crop == "simple":
            self.simple = v2.Compose(
                [
                    v2.Resize(input_size, v2.InterpolationMode.BICUBIC, antialias=True),
                    v2.RandomCrop(input_size, padding=4, padding_mode="reflect"),
                    v2.RandomHorizontalFlip(flip_probability),
                ]
            )
        self.colours = Colours(partial(colours.pillow_blur, max_radius=MAX_RADIUS))
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

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
        mean, std = (v.to(levels.device, non_blocking=True) for v in (self.mean, self.std))
        return done | {"images": colours.normalize(levels, mean, std)}
