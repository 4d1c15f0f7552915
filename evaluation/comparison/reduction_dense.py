"""Segment digits by a linear head on frozen patches, to evaluate the patches of reduced nets.

Bright pixels have the digit's class, dark ones are background. The head is fitted on the patches of
the unreduced net and evaluated on those that a reduced net restores, as dense heads are used
without retraining (Liang et al. 2022).

Letters in shapes: N images, H side in pixels, h w grid of patches, D channels.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evaluation.features.dataset import device_of
from evaluation.features.reading import patch_tokens
from evaluation.pictures.figures import visible
from evaluation.probes.logistic import LogisticModel, fit_logistic
from evaluation.segmentation.iou import Confusion
from evaluation.segmentation.patches import label_patches, majority_labels

BACKGROUND = 0


class DenseHead(NamedTuple):
    """A linear classifier of standardised patches; labels are 0 and a digit's class + 1."""

    mean: Tensor  # [D]
    scale: Tensor  # [D]
    model: LogisticModel

    def __call__(self, patches: Tensor) -> Tensor:
        """Labels [N h w], uint8, of patches [N h w D]."""
        rows = (patches.flatten(0, 2) - self.mean) / self.scale
        return self.model.scores(rows).argmax(dim=1).view(patches.shape[:3]).to(torch.uint8)


def masks_of(images: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Masks [N H H], uint8, of normalised images [N 3 H H] with classes [N]."""
    bright = visible(images).mean(dim=-1) > threshold
    return torch.where(bright, labels[:, None, None] + 1, BACKGROUND).to(torch.uint8)


@torch.no_grad()
def fit_dense_head(
    net: Any, images: Tensor, labels: Tensor, settings: Mapping[str, Any], batch_size: int
) -> DenseHead:
    """The head of a net's own patches; each is labelled by most of its pixels.

    settings: threshold, C and max_iter of configs/reduction_comparison.yaml.
    """
    rows = torch.cat([found.flatten(0, 2).cpu() for found in _patches(net, images, batch_size)])
    masks = masks_of(images, labels, settings["threshold"])
    targets = majority_labels(label_patches(masks.long(), net.patch_size).flatten(0, 2)).long()
    mean, scale = rows.mean(dim=0), rows.std(dim=0).clamp_min(1e-6)
    model = fit_logistic(
        lambda: [((rows - mean) / scale, targets)],
        num_classes=int(labels.max()) + 2,
        dim=rows.shape[1],
        C=settings["C"],
        max_iter=settings["max_iter"],
        tol=1e-5,
    )
    return DenseHead(mean, scale, model)


@torch.no_grad()
def mean_iou(
    net: Any, head: DenseHead, images: Tensor, labels: Tensor, threshold: float, batch_size: int
) -> float:
    """mIoU in percent over pixels, each patch's label copied to its pixels."""
    confusion = Confusion()
    masks = masks_of(images, labels, threshold)
    shares = zip(_patches(net, images, batch_size), masks.split(batch_size), strict=True)
    for patches, mask in shares:
        found = head(patches.cpu())
        side = net.patch_size
        confusion.add(mask, found.repeat_interleave(side, 1).repeat_interleave(side, 2))
    return 100 * confusion.scores([]).miou


def _patches(net: Any, images: Tensor, batch_size: int) -> Iterator[Tensor]:
    for part in images.split(batch_size):
        yield patch_tokens(net, part.to(device_of(net))).float()
