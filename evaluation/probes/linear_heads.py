"""The grid of linear classifiers of DINOv2's ImageNet probe, with one product for each input.

A head is one choice of (number of last blocks n, pooled patches or not, learning rate).
Letters: H heads, R rates, B batch, N patches, D channels of the net, W width of an input, C
classes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.errors import UserError
from vit.backbone import Features

INIT_STD = 0.01


class Input(NamedTuple):
    """The input of a head: class tokens of the last `num_blocks` blocks, with or without patches.

    The patches are always those of the last block alone, averaged.
    """

    num_blocks: int
    avgpool: bool

    def width(self, widths: Sequence[int]) -> int:
        """The number of channels, given those of the blocks, earliest first."""
        return sum(widths[-self.num_blocks :]) + self.avgpool * widths[-1]

    def read(self, features: Sequence[Features]) -> Tensor:
        """The input [B W] in float32, from the features of blocks, earliest first."""
        parts = [block.cls for block in features[-self.num_blocks :]]
        if self.avgpool:
            parts.append(pooled_patches(features[-1]))
        return torch.cat(parts, dim=-1).float()


class Head(NamedTuple):
    """One point of the grid."""

    input: Input
    lr: float


def pooled_patches(features: Features) -> Tensor:
    """Mean of the patches [B D]; UserError for a net that has none."""
    if features.patches is None:
        raise UserError(
            "the net gives no patches that could be pooled; use avgpools=[false] in the linear "
            "probe, representations=[cls] in the attentive one"
        )
    return features.patches.mean(dim=(1, 2))


def make_grid(
    num_blocks_list: Sequence[int], avgpools: Sequence[bool], rates: Sequence[float]
) -> list[Head]:
    """All heads, in the published order: blocks, then pooling, then rates."""
    return [
        Head(Input(num_blocks, bool(avgpool)), rate)
        for num_blocks in num_blocks_list
        for avgpool in avgpools
        for rate in rates
    ]


def published_name(head: Head, *, digits: int = 5) -> str:
    """DINOv2's name of a head, with `digits` decimals of the rate."""
    (num_blocks, avgpool), lr = head
    name = f"classifier_{num_blocks}_blocks_avgpool_{avgpool}_lr_{lr:.{digits}f}"
    return name.replace(".", "_")


def name_heads(grid: Sequence[Head]) -> list[str]:
    """The published name of each head, with more decimals where several heads would share a name.

    Departs from DINOv2: there 5e-6 and 1e-5 are both 0_00001, and one of the heads is lost.
    """
    assert len(set(grid)) == len(grid)
    names = [published_name(head) for head in grid]
    digits = 5
    while len(set(names)) < len(names):
        digits += 1
        count = Counter(names)
        names = [
            published_name(head, digits=digits) if count[name] > 1 else name
            for head, name in zip(grid, names, strict=True)
        ]
    return names


class LinearHeads(nn.Module):
    """H linear classifiers of C classes; those with the same input share one parameter [R C W].

    `embed_dim` is the width of every block, or a list of the last blocks' if they differ (CNNs).
    `loss_weights` are the heads' learning rates: SGD without weight decay is linear in the
    gradient, so a loss times a rate, trained at rate 1, is the loss trained at that rate.
    Memory at ImageNet's size (D = 1280, 52 heads, C = 1000): 200 M parameters, which is 0.8 GB,
    and as much again for the gradients and for the momentum each (by arithmetic).
    """

    loss_weights: Tensor

    def __init__(
        self,
        grid: Sequence[Head],
        *,
        embed_dim: int | Sequence[int],
        num_classes: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.names, self.num_classes = name_heads(grid), num_classes
        self.rates = [head.lr for head in grid]
        self.inputs = list(dict.fromkeys(head.input for head in grid))
        self.layers = tuple(range(-max(read.num_blocks for read in self.inputs), 0))
        widths = [embed_dim] * len(self.layers) if isinstance(embed_dim, int) else list(embed_dim)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for read in self.inputs:
            heads = sum(head.input == read for head in grid)
            weight = torch.empty(heads, num_classes, read.width(widths))
            weight.normal_(0, INIT_STD, generator=generator)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(heads, num_classes)))
        self.register_buffer("loss_weights", torch.tensor(self.rates), persistent=False)

    def read(self, features: Sequence[Features]) -> list[Tensor]:
        """The distinct inputs [B W], each shared by several heads."""
        return [read.read(features) for read in self.inputs]

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits [H B C], heads in the order of the grid."""
        logits = []
        for x, weight, bias in zip(inputs, self.weights, self.biases, strict=True):
            flat = F.linear(x, weight.flatten(0, 1), bias.flatten())
            logits.append(flat.unflatten(1, bias.shape).transpose(0, 1))
        return torch.cat(logits)

    def published_state(self) -> dict[str, Tensor]:
        """Views of the parameters under the names of DINOv2's files."""
        return {
            f"classifiers_dict.{name}.linear.{kind}": value
            for name, (weight, bias) in zip(self.names, self._by_head(), strict=True)
            for kind, value in (("weight", weight), ("bias", bias))
        }

    @torch.no_grad()
    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Load parameters by these names; UserError for another grid, width or classes."""
        check_same_heads(state, self.published_state())
        for name, value in self.published_state().items():
            value.copy_(state[name])

    def _by_head(self) -> Iterator[tuple[Tensor, Tensor]]:
        for weights, biases in zip(self.weights, self.biases, strict=True):
            yield from zip(weights.detach(), biases.detach(), strict=True)


def head_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of each head [H], of logits [H B C] and labels [B]."""
    heads = len(logits)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(heads), reduction="none")
    return losses.view(heads, -1).mean(1)


def check_same_heads(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """UserError, in one line, if names or shapes of saved heads differ from our own."""
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        parts = [
            f"{len(names)} {what} (such as {names[0]})"
            for what, names in (("missing", missing), ("left over", extra))
            if names
        ]
        raise UserError(f"the file holds another grid of heads: {', '.join(parts)}")
    for name, value in own.items():
        if state[name].shape != value.shape:
            raise UserError(
                f"the file holds heads of another net or data set: {name} is "
                f"{[*state[name].shape]}, here {[*value.shape]}"
            )
