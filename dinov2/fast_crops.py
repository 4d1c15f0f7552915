"""Multi-crop augmentation for a busy device: the workers crop, the device colours.

The crops of `dinov2.crops.MultiCrop` with the same distribution. A worker decodes an image once and
cuts uint8 crops from it; jitter, grey, blur and solarization run on whole batches on the device.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from dinov2.crops import CropOptions
from utils.data import colours
from utils.data.colour_plan import Colours, draw_colours
from utils.data.encoded import EncodedImage
from utils.data.random_crops import CropKind, cut_crops

JITTER = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
STAGES = ("jitter", "greyscale", "blur", "solarize")


class FastMultiCrop(CropOptions):
    """An encoded image to uint8 crops and colours drawn for them; `finish` colours the crops.

    Keywords as of `dinov2.crops.CropOptions`.
    """

    takes_encoded = True

    def __post_init__(self) -> None:
        super().__post_init__()
        locals_ = self.local_crops_number
        kinds = [CropKind(2, self.global_crops_size, _pair(self.global_crops_scale))]
        if locals_:
            kinds.append(CropKind(locals_, self.local_crops_size, _pair(self.local_crops_scale)))
        self.kinds = kinds
        first, second, local = self.blur_probabilities
        self.drawing: dict[str, Any] = {
            "jitter": JITTER,
            "jitter_probability": self.color_jitter_probability,
            "greyscale_probability": self.grayscale_probability,
            "blur_probability": [first, second] + [local] * locals_,
            "solarize_probability": [0.0, self.solarize_probability] + [0.0] * locals_,
        }
        self.colours = Colours(partial(colours.gaussian_blur, kernel_size=self.blur_kernel_size))
        self.normal = torch.tensor(self.mean), torch.tensor(self.std)

    def __call__(self, image: EncodedImage | Image) -> dict[str, Tensor]:
        """uint8 crops of one image, each drawn from the whole of it, and their draws of colours."""
        crops = cut_crops(image, self.kinds, flip_probability=self.flip_probability)
        draws = torch.from_numpy(draw_colours(2 + self.local_crops_number, **self.drawing))
        sample = {"global_crops": crops[0], "global_colours": draws[:2]}
        if self.local_crops_number:
            sample |= {"local_crops": crops[1], "local_colours": draws[2:]}
        return sample

    def finish(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with coloured, normalised crops in place of uint8 ones and their plans."""
        done = dict(batch)
        for kind in ("global", "local"):
            if f"{kind}_crops" in done:
                pixels, plan = done[f"{kind}_crops"], done.pop(f"{kind}_colours")
                levels = self.colours(pixels, plan)
                mean, std = (v.to(levels.device, non_blocking=True) for v in self.normal)
                done[f"{kind}_crops"] = colours.normalize(levels, mean, std)
        return done


def _pair(values: Sequence[float]) -> tuple[float, float]:
    return float(values[0]), float(values[1])
