"""The published, interpolated G-CNN kernels: to read old checkpoints, not to build on.

Kernels are sampled at rotated places, bilinearly in space and linearly over the group. The cyclic
layers are equivariant to the accuracy of float32 tables; the published E(2) stem behind them
composes its elements wrongly and is not, so only its lifting is here. For a new network take
`baselines.gevit.gcnn`.

Letters in shapes: B images, C D channels in and out, G elements, H W map, k kernel side.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
        self.register_buffer("places", torch.as_tensor(places.copy()), persistent=False)

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
    """Maps [B C G H W] to [B D G h w] over `order` rotations.

    The axes of the sampled weight are mixed (group by a spatial place, column by the group), as
    published: any fixed function of the three would do.
    """

    places: Tensor  # [G G k k 3]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        order: int = 4,
        padding: int = 0,
    ) -> None:
        super().__init__()
        self.padding = padding
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels, order, kernel_size, kernel_size)
        )
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        places = np.empty((order, order, kernel_size, kernel_size, 3))
        for output in range(order):
            row, col = np.moveaxis(moved_grid(kernel_size, output, order), -1, 0)
            for source in range(order):
                places[output, source, ..., 0] = (
                    2 * ((output - source) % order) / max(order - 1, 1) - 1
                )
                places[output, source, ..., 1] = row
                places[output, source, ..., 2] = col
        self.register_buffer("places", torch.as_tensor(places), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the kernel sampled for every pair of elements."""
        outputs, inputs, order = self.weight.shape[:3]
        weight = self.weight.flatten(0, 1)[None].expand(order, -1, -1, -1, -1)
        sampled = F.grid_sample(weight, self.places.to(weight.dtype), align_corners=True)
        kernels = sampled.unflatten(1, (outputs, inputs)).transpose(0, 1)  # [D G C G k k]
        y = F.conv2d(x.flatten(1, 2), kernels.flatten(2, 3).flatten(0, 1), padding=self.padding)
        return y.unflatten(1, (outputs, order))


class PublishedGCNN(nn.Module):
    """The published stem over rotations: images [B C H W] to maps [B D 6 6]."""

    def __init__(
        self,
        in_channels: int,
        *,
        out_channels: int = 8,
        kernel_size: int = 5,
        num_hidden: int = 8,
        hidden_channels: int = 8,
        order: int = 4,
        pool: int = 6,
    ) -> None:
        super().__init__()
        widths = [hidden_channels] * (num_hidden - 1) + [out_channels]
        self.pool = pool
        self.lifting_conv = PublishedLiftingConv(in_channels, widths[0], kernel_size, order=order)
        self.gconvs = nn.ModuleList(
            PublishedGroupConv(before, after, kernel_size, order=order)
            for before, after in zip(widths, widths[1:], strict=False)
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
