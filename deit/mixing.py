"""Mixing the images of a batch pairwise: mixup (Zhang et al. 2018), CutMix (Yun et al. 2019)."""

from collections.abc import Sequence

import numpy as np
import torch
from timm.data import Mixup
from torch import Generator, Tensor

MODES = ("batch", "pair", "elem")


class Mixing:
    """timm's mixup and CutMix: which of the two, and by how much.

    mixup, cutmix: parameters of the Beta distribution the shares come from; 0 leaves one out.
    cutmix_minmax: the cut box's sides as shares of the image's, instead. probability: that a batch
    is mixed at all. switch_probability: that CutMix is taken where both could be. mode: one share
    per batch, per pair, or per image. An image's partner is its mirror place in the batch.
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
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r} of mixing; known: {', '.join(MODES)}")
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

    def build(self, num_classes: int, smoothing: float = 0.0) -> Mixup:
        """The function (images [B 3 S S], labels [B]) -> (mixed images, targets [B C])."""
        return Mixup(num_classes=num_classes, label_smoothing=smoothing, **self.options)


class Collate:
    """Samples to {"images": [B 3 S S], "targets": indices [B], or [B C] where images are mixed}.

    What is drawn depends on the batch's generator alone.
    """

    def __init__(self, mix: Mixup | None = None) -> None:
        self.mix = mix

    def __call__(
        self, samples: Sequence[tuple[Tensor, int]], generator: Generator
    ) -> dict[str, Tensor]:
        """Collate and mix one batch."""
        images = torch.stack([image for image, _ in samples])
        targets = torch.tensor([label for _, label in samples])
        if self.mix is not None:
            state = np.random.get_state()  # timm draws from numpy's global generator
            np.random.seed(int(torch.randint(2**31, (), generator=generator)))
            images, targets = self.mix(images, targets)
            np.random.set_state(state)
        return {"images": images, "targets": targets}
