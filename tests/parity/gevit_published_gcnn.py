"""The published, interpolated G-CNN kernels, which no network here can have as its stem.

Kernels are sampled at rotated places, bilinearly in space and linearly over the group. Here the
places are computed by the published formulas in float64. A published file contains its own, made in
float32: for some orders a sum of angles rounds to a full turn instead of none, and elements of E(2)
are composed wrongly, so that such layers are not equivariant. `published_kernels` loads them with
the weights, so that these layers compute what the published ones do. The stem of networks is
`baselines.gevit.gcnn`.

Letters in shapes: B images, C D channels in and out, G elements, H W map, k kernel side.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.gevit.groups import PlaneGroup

# These follow from the tables of places.
_CONSTANTS = ("grid_R2", "grid_H", "group.identity")


def published_kernels(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights and places of published layers, or of a stem of them, under the names here.

    Unknown names are not changed, so that a strict load refuses them.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        owner, kernel, leaf = name.rpartition("kernel.")
        if not kernel:
            found[name] = tensor
        elif leaf in _CONSTANTS:
            continue
        elif leaf.startswith("transformed_grid_"):
            # From (row, column) or (row, column, group) in front to what grid_sample reads.
            found[f"{owner}places"] = tensor.movedim(0, -1).roll(1, dims=-1)
        else:
            found[f"{owner}{leaf}"] = tensor
    return found


class PublishedLiftingConv(nn.Module):
    """Images [B C H W] to [B D G h w] over `order` rotations, and their mirrorings if asked for."""

    places: Tensor  # [G k k 2], column before row as grid_sample reads them

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        order: int = 4,
        mirrors: bool = False,
        padding: int = 0,
    ) -> None:
        super().__init__()
        self.padding = padding
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        places = np.stack(
            [
                moved_grid(kernel_size, index, order, mirrored)[..., ::-1]
                for mirrored in range(1 + mirrors)
                for index in range(order)
            ]
        )
        self.register_buffer("places", torch.as_tensor(places.copy()))

    def forward(self, images: Tensor) -> Tensor:
        """Convolve with the kernel sampled for every element."""
        outputs, inputs = self.weight.shape[:2]
        order, size = self.places.shape[0], self.places.shape[1]
        weight = self.weight.flatten(0, 1)[None].expand(order, -1, -1, -1)
        sampled = F.grid_sample(weight, self.places.to(weight.dtype), align_corners=True)
        kernels = sampled.view(order, outputs, inputs, size, size).transpose(0, 1)
        y = F.conv2d(images, kernels.flatten(0, 1), padding=self.padding)
        return y.unflatten(1, (outputs, order))


class PublishedGroupConv(nn.Module):
    """Maps [B C G H W] to [B D G h w] over `order` rotations, and their mirrorings if asked for.

    The axes of the sampled weight are mixed (group by a spatial place, column by the group), as
    published: any fixed function of the three would do. With mirrorings the place on the group is
    divided by the last rotation, so that those behind it fall outside and count as zero: another
    published fault.
    """

    places: Tensor  # [G G k k 3]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        order: int = 4,
        mirrors: bool = False,
        padding: int = 0,
    ) -> None:
        super().__init__()
        group = PlaneGroup(order, mirrors)
        self.padding = padding
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels, group.order, kernel_size, kernel_size)
        )
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        places = np.empty((group.order, group.order, kernel_size, kernel_size, 3))
        for output in range(group.order):
            rotation, mirrored = group.parts(output)
            places[output, ..., 1:] = moved_grid(kernel_size, rotation, order, mirrored)
            for source in range(group.order):
                relation = group.compose(group.inverse(source), output)
                places[output, source, ..., 0] = 2 * relation / max(order - 1, 1) - 1
        self.register_buffer("places", torch.as_tensor(places))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the kernel sampled for every pair of elements."""
        outputs, inputs, order = self.weight.shape[:3]
        weight = self.weight.flatten(0, 1)[None].expand(order, -1, -1, -1, -1)
        sampled = F.grid_sample(weight, self.places.to(weight.dtype), align_corners=True)
        kernels = sampled.unflatten(1, (outputs, inputs)).transpose(0, 1)  # [D G C G k k]
        y = F.conv2d(x.flatten(1, 2), kernels.flatten(2, 3).flatten(0, 1), padding=self.padding)
        return y.unflatten(1, (outputs, order))


class PublishedGCNN(nn.Module):
    """The published stem: images [B C H W] to maps [B D 6 6], D = hidden_channels.

    kernel_size: of all `num_hidden` convolutions, or a list with one for each, which sets their
    number.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        hidden_channels: int = 8,
        kernel_size: int | Sequence[int] = 5,
        num_hidden: int = 8,
        order: int = 4,
        mirrors: bool = False,
        pool: int = 6,
    ) -> None:
        super().__init__()
        sizes = [kernel_size] * num_hidden if isinstance(kernel_size, int) else list(kernel_size)
        width = hidden_channels
        self.pool = pool
        self.lifting_conv = PublishedLiftingConv(
            in_channels, width, sizes[0], order=order, mirrors=mirrors
        )
        self.gconvs = nn.ModuleList(
            PublishedGroupConv(width, width, size, order=order, mirrors=mirrors)
            for size in sizes[1:]
        )

    def forward(self, images: Tensor) -> Tensor:
        """Norm and ReLU after each convolution, then a maximum over group and space."""
        x = self.lifting_conv(images)
        for layer in self.gconvs:
            x = layer(F.relu(F.layer_norm(x, x.shape[1:])))
        x = F.relu(F.layer_norm(x, x.shape[1:]))
        return F.adaptive_max_pool2d(x.amax(dim=2), self.pool)


def moved_grid(size: int, index: int, order: int, mirrored: bool | int = False) -> np.ndarray:
    """Places (row, column) of a k x k kernel moved back by an element: float64 [k k 2]."""
    angle = 2 * math.pi * index / order
    cos, sin = math.cos(angle), math.sin(angle)
    element = np.array([[cos, -sin], [sin, cos]])
    if mirrored:
        element = np.diag([1.0, -1.0]) @ element
    line = np.linspace(-1.0, 1.0, size)
    grid = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1)
    return grid @ np.linalg.inv(element).T
