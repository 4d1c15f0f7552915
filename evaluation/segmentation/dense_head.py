"""A linear layer per patch, trained in steps that do not depend on how a batch is split.

The patches come from a frozen net, so the statistics of the batch normalisation are constants of a
step: they are computed first, over all micro-batches of all ranks, without gradients. Dropout is
seeded per image. Hence a step is the same (to rounding) on any number of GPUs with any
accumulation; SyncBatchNorm, which covers only the ranks, would not ensure that.

Letters: B images, h w grid of patches, D channels, C classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from utils import distributed
from utils.ranges import check_counts, check_order, check_range, check_share

EPSILON, MOMENTUM = 1e-5, 0.1  # torch's defaults of batch normalisation


@dataclass(frozen=True, kw_only=True)
class PixelHeadSettings:
    """Settings of a head's training; sizes in pixels, a step is a whole effective batch."""

    crop_size: int
    image_size: int
    scale: tuple[float, float]
    hflip_probability: float
    photometric: bool
    num_steps: int
    warmup_steps: int
    effective_batch_size: int
    learning_rate: float
    weight_decay: float
    dropout_rate: float
    seed: int

    def __post_init__(self) -> None:
        check_counts(1, num_steps=self.num_steps, effective_batch_size=self.effective_batch_size)
        check_counts(seed=self.seed)
        check_range("warmup_steps", self.warmup_steps, 0, self.num_steps)
        check_order("scale", self.scale, 0, math.inf, ends="()")
        check_range("learning_rate", self.learning_rate)
        check_range("weight_decay", self.weight_decay)
        check_range("dropout_rate", self.dropout_rate, 0, 1, ends="[)")
        check_share("hflip_probability", self.hflip_probability)


class Statistics(NamedTuple):
    """Mean and (population) variance of every channel over `patches` patches."""

    mean: Tensor  # [D]
    variance: Tensor  # [D]
    patches: int


class PixelHead(nn.Module):
    """Batch normalisation and a linear layer (a 1 x 1 convolution) on a map of patches.

    Calling it uses the running statistics, whatever the mode; training uses `classify`.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, embed_dim: int, num_classes: int, *, seed: int = 0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("variance", torch.ones(embed_dim))
        self.scale = nn.Parameter(torch.ones(embed_dim))
        self.shift = nn.Parameter(torch.zeros(embed_dim))
        self.linear = nn.Linear(embed_dim, num_classes)
        generator = Generator().manual_seed(seed)
        with torch.no_grad():
            self.linear.weight.normal_(0, 0.01, generator=generator)
            self.linear.bias.zero_()

    def forward(self, patches: Tensor) -> Tensor:
        """Logits [B C h w] of patches [B h w D]."""
        return self.classify(patches, Statistics(self.mean, self.variance, 0))

    def classify(self, patches: Tensor, statistics: Statistics) -> Tensor:
        """Logits [B C h w] of patches [B h w D] normalised by given statistics."""
        mean, variance, _ = statistics
        rows = nn.functional.batch_norm(
            patches.flatten(0, -2), mean, variance, self.scale, self.shift, eps=EPSILON
        )
        return self.linear(rows).unflatten(0, patches.shape[:-1]).movedim(-1, 1)

    @torch.no_grad()
    def remember(self, statistics: Statistics) -> None:
        """Update the running statistics, as batch normalisation does (unbiased variance)."""
        mean, variance, patches = statistics
        self.mean.lerp_(mean, MOMENTUM)
        self.variance.lerp_(variance * patches / max(patches - 1, 1), MOMENTUM)


@torch.no_grad()
def whole_batch_statistics(parts: Sequence[Tensor]) -> Statistics:
    """Statistics over the patches [B h w D] of all micro-batches and ranks; a collective call."""
    count = sum(part.shape[:-1].numel() for part in parts) * distributed.world_size()
    mean = _total([part.sum(dim=(0, 1, 2), dtype=torch.float64) for part in parts]) / count
    centred = [(part - mean.to(part.dtype)).square() for part in parts]
    variance = _total([part.sum(dim=(0, 1, 2), dtype=torch.float64) for part in centred]) / count
    return Statistics(mean.to(parts[0].dtype), variance.to(parts[0].dtype), count)


def drop_channels(patches: Tensor, seeds: Tensor, rate: float) -> Tensor:
    """Zero whole channels of each image with probability `rate`, divide the rest by 1 - rate."""
    if rate == 0:
        return patches
    kept = torch.stack(
        [
            torch.rand(patches.shape[-1], generator=Generator().manual_seed(seed)) >= rate
            for seed in seeds.tolist()
        ]
    )
    return patches * (kept.to(patches) / (1 - rate))[:, None, None, :]


def sum_over_ranks(module: nn.Module, loss: Tensor) -> Tensor:
    """Sum the gradients of `module` and the loss over all ranks, in place; returns the loss."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    for tensor in (*gradients, loss):
        tensor.copy_(distributed.all_reduce_sum(tensor))
    return loss


def learning_rate(step: int, *, base: float, num_steps: int, warmup_steps: int) -> float:
    """The learning rate of a step counted from 0: a linear warm-up, then a cosine.

    The warm-up rises from 1e-6 of the base, times a line that falls from 1 to 0 at `num_steps`. The
    cosine is that of the whole training, from which the warm-up's steps are cut off. Departs from
    DINOv3: there the first rate holds for two steps.
    """
    if step < warmup_steps:
        ramp = 1e-6 + (1 - 1e-6) * step / warmup_steps
        return base * ramp * (1 - step / num_steps)
    return base * (1 + math.cos(math.pi * min((step + 1) / num_steps, 1.0))) / 2


def _total(sums: Sequence[Tensor]) -> Tensor:
    return distributed.all_reduce_sum(sum(sums[1:], sums[0]))
