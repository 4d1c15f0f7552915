"""Mixing the images of a batch pairwise: mixup (Zhang et al. 2018), CutMix (Yun et al. 2019)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from torch import Generator, Tensor
from torch.utils.data import default_collate

from deit.fast_augment import STAGES
from utils.data.colour_plan import plan_colours
from utils.errors import UserError
from utils.ranges import OutOfRange, check_order, check_range, check_share, check_word

MODES = ("batch", "pair", "elem")


class Mixing:
    """timm's mixup and CutMix: which of the two, and by how much.

    mixup, cutmix: parameters of the Beta distribution the shares come from; 0 leaves one out.
    cutmix_minmax: the cut box's sides as shares of the image's, instead; the greatest is excluded.
    mode: whether a batch, a pair or an image draws its own share and all that follows. probability:
    that it is mixed at all. switch_probability: that CutMix is taken where both could be. An
    image's partner is its mirror place in the batch.
    """

    def __init__(
        self,
        *,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        cutmix_minmax: Sequence[float] | None = None,
        probability: float = 1.0,
        switch_probability: float = 0.5,
        mode: str = "batch",
    ) -> None:
        check_word("mode", mode, MODES)
        check_range("mixup", mixup)
        check_range("cutmix", cutmix)
        if cutmix_minmax is not None:
            check_order("cutmix_minmax", cutmix_minmax, 0, 1)
            if cutmix_minmax[0] == cutmix_minmax[1]:
                raise OutOfRange(
                    f"cutmix_minmax must be two different values, not {list(cutmix_minmax)}"
                )
        check_share("probability", probability)
        check_share("switch_probability", switch_probability)
        if not (mixup > 0 or cutmix > 0 or cutmix_minmax):
            raise ValueError("mixing needs mixup or cutmix above 0; mixing=null leaves both out")
        self.options = {
            "mixup_alpha": mixup,
            "cutmix_alpha": cutmix,
            "cutmix_minmax": cutmix_minmax,
            "prob": probability,
            "switch_prob": switch_probability,
            "mode": mode,
        }

    def build(self, num_classes: int, smoothing: float = 0.0) -> "Mixer":
        """What mixes the batches of a training."""
        return Mixer(Mixup(num_classes=num_classes, label_smoothing=smoothing, **self.options))


class Mixer:
    """Mixes batches on their device; the random numbers depend on the batch's own seed alone."""

    def __init__(self, mix: Mixup) -> None:
        self.mix = mix

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with mixed images [B 3 S S] and targets [B C] for class indices [B].

        UserError for images on which no whole number of pixels is a side of the cut box.
        """
        if shares := self.mix.cutmix_minmax:
            _check_box(shares, batch["images"].shape[-2:])
        state = np.random.get_state()  # timm draws from numpy's global generator
        np.random.seed(batch["mixing_seed"])
        images, targets = self.mix(batch["images"], batch["targets"])
        np.random.set_state(state)
        return {"images": images, "targets": targets}


def _check_box(shares: Sequence[float], sides: Sequence[int]) -> None:
    least, greatest = shares
    for side in sides:
        if int(side * least) == int(side * greatest):
            raise UserError(
                f"recipe.mixing.cutmix_minmax {list(shares)} leaves no side of a cut box in {side} "
                "pixels; take values further apart"
            )


class Collate:
    """Samples to {"images": [B 3 S S], "targets": class indices [B], "mixing_seed": a number}.

    From an augmentation that leaves the colours to the device the images are uint8, and "colours"
    is their plan. The seed depends on the batch's generator alone.
    """

    def __call__(self, samples: Sequence[tuple[Any, int]], generator: Generator) -> dict[str, Any]:
        """Collate one batch."""
        batch = default_collate([sample for sample, _ in samples])
        if isinstance(batch, Tensor):
            batch = {"images": batch}
        else:
            batch["colours"] = plan_colours(batch["colours"], STAGES)
        batch["targets"] = torch.tensor([label for _, label in samples])
        batch["mixing_seed"] = int(torch.randint(2**31, (), generator=generator))
        return batch
