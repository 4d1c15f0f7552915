"""Watch the features of a net in training, and warn where they collapse."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from utils import distributed, layout
from utils.probing import undisturbed

# Below this effective rank, or relative standard deviation, features have collapsed.
MIN_RANK, MIN_STD = 1.5, 1e-3


class FeatureWatch:
    """What the last `examine` found: `alarm`, one line if the features are collapsed or not finite.

    `overflow` says that they were not finite though the images were.
    """

    def __init__(self) -> None:
        self.alarm = ""
        self.overflow = False

    def examine(self, net: nn.Module, batch: Any) -> dict[str, float]:
        """Effective rank and standard deviation of the net's features on the batch's images.

        At most 128 images per rank; empty for a net that is no Backbone, whatever its `features`
        are, and for one image or two, which span a line whatever the net. Every rank must call
        this.
        """
        images = _images(batch)
        if images is None or not callable(getattr(net, "features", None)):
            return {}
        with undisturbed(net):
            found = net.features(images[:128])
        last = found[-1] if isinstance(found, list | tuple) and found else None
        features = getattr(last, "cls", None)
        if not isinstance(features, Tensor):  # as of torchvision's VGG, or of a net of the user's
            return {}
        features = distributed.all_gather_variable(layout.whole(features).float()).cpu()
        self.overflow = not features.isfinite().all()
        if self.overflow:  # on every rank, as all have gathered the same
            shown = (~images.isfinite().all()).float()
            self.overflow = not distributed.all_reduce_max(shown)
            what = "features" if self.overflow else "images"
            self.alarm = f"ALARM: the {what} are not finite"
            return {}
        if len(features) <= 2:
            self.alarm = ""
            return {}
        std = relative_std(features)
        rank = effective_rank(features)
        self.alarm = ""
        if not (rank >= MIN_RANK and std >= MIN_STD):
            self.alarm = (
                f"ALARM: the features have collapsed (effective rank {rank:.2f}, relative "
                f"standard deviation {std:.1e}): all images look alike to the network"
            )
        return {
            "feature_rank": rank,
            "feature_std": features.std(0).mean().item(),
            "feature_relative_std": std,
        }


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the centred features' [B D] singular values, normalised to sum 1.

    From 1 to min(B - 1, D). Roy and Vetterli 2007; 0 for constant features.
    """
    centred = (features - features.mean(0)).double()
    values = torch.linalg.svdvals(centred)
    shares = values / values.sum().clamp(min=1e-300)
    return torch.special.entr(shares).sum().exp().item() if values.sum() > 0 else 0.0


def relative_std(features: Tensor) -> float:
    """Root mean square distance of features [B D] from their mean, over that from 0: 0 to 1."""
    features = features.double()
    spread = (features - features.mean(0)).square().sum(1).mean()
    return (spread / features.square().sum(1).mean().clamp(min=1e-300)).sqrt().item()


def _images(batch: Any) -> Tensor | None:
    # The largest images of the batch, whatever the recipe calls them: float tensors [B C H W],
    # maybe in lists.
    found: list[Tensor] = []

    def visit(value: Any) -> None:
        if isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point():
            found.append(value)
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    visit(batch)
    return max(found, key=lambda images: images.shape[-1] * images.shape[-2]) if found else None
