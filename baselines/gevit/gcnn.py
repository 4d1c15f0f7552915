"""Convolutions over the symmetries of the pixel grid without interpolation: an exact stem.

Feature maps [B C G H W], axis G in the order of the group's elements. The law is y(T_g x)[h] =
T_g y(x)[g^-1 h]: unlike in GE-ViT's attention, the element acts from the left.

Source: Cohen and Welling 2016, "Group Equivariant Convolutional Networks". Departs from GE-ViT,
whose hybrid has interpolated kernels over wrongly composed elements: it is not equivariant.

Letters in shapes: B images, C D channels in and out, G elements, H W map, k kernel side.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octic.groups import Group, get_group, inverse, multiply
from utils.ranges import check_count, check_flags


class LiftingConv(nn.Module):
    """Images [B C H W] to [B D G h w]: y[o, h] = conv(x, T_h W[o])."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        padding: int = 0,
        group: str | Group = "D4",
    ) -> None:
        super().__init__()
        self.group, self.padding = get_group(group), padding
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        _init(self.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Convolve with every moved kernel."""
        kernels = torch.stack([e.on_images(self.weight) for e in self.group.elements], dim=1)
        y = F.conv2d(images, kernels.flatten(0, 1), padding=self.padding)
        return y.unflatten(1, kernels.shape[:2])


class GroupConv(nn.Module):
    """Maps [B C G H W] to [B D G h w]: y[o, h] = sum_c sum_j conv(x[c, j], T_h W[o, c, h^-1 j])."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        padding: int = 0,
        group: str | Group = "D4",
    ) -> None:
        super().__init__()
        self.group, self.padding = get_group(group), padding
        elements = self.group.elements
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels, len(elements), kernel_size, kernel_size)
        )
        _init(self.weight)
        self._sources = [
            [elements.index(multiply(inverse(h), j)) for j in elements] for h in elements
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with every moved kernel."""
        moved = [
            element.on_images(self.weight[:, :, source])
            for element, source in zip(self.group.elements, self._sources, strict=True)
        ]
        kernels = torch.stack(moved, dim=1)  # [D G C G k k]
        y = F.conv2d(x.flatten(1, 2), kernels.flatten(2, 3).flatten(0, 1), padding=self.padding)
        return y.unflatten(1, kernels.shape[:2])


class GCNN(nn.Module):
    """A lifting and `num_hidden` - 1 group convolutions without padding, then a maximum: a stem.

    After each convolution a norm over all but the batch, without gain, and ReLU. pool: side of the
    map that comes out, by adaptive maximum pooling, which obeys the symmetries for every size;
    None pools no space. pool_group: also take the maximum over the group ([B D h w], equivariant
    as an image is), or keep it ([B D G h w]).
    """

    def __init__(
        self,
        in_channels: int,
        *,
        out_channels: int = 8,
        hidden_channels: int = 8,
        kernel_size: int = 5,
        num_hidden: int = 8,
        pool: int | None = 6,
        pool_group: bool = True,
        group: str | Group = "D4",
    ) -> None:
        super().__init__()
        check_count("out_channels", out_channels, 1)
        check_count("hidden_channels", hidden_channels, 1)
        check_count("kernel_size", kernel_size, 1)
        check_count("num_hidden", num_hidden, 1)
        check_count("pool", 1 if pool is None else pool, 1)
        check_flags(pool_group=pool_group)
        self.group, self.pool, self.pool_group = get_group(group), pool, pool_group
        self.num_channels = out_channels
        self.shrinkage = num_hidden * (kernel_size - 1)
        widths = [hidden_channels] * (num_hidden - 1) + [out_channels]
        self.lift = LiftingConv(in_channels, widths[0], kernel_size, group=self.group)
        self.gconvs = nn.ModuleList(
            GroupConv(before, after, kernel_size, group=self.group)
            for before, after in zip(widths, widths[1:], strict=False)
        )

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        """Size of the output map; ValueError if an image is too small."""
        height, width = height - self.shrinkage, width - self.shrinkage
        if min(height, width) < (self.pool or 1):
            raise ValueError(
                f"the G-CNN stem leaves {height} x {width} pixels to be pooled to "
                f"{self.pool or 1} x {self.pool or 1}; give larger images or fewer convolutions"
            )
        return (height, width) if self.pool is None else (self.pool, self.pool)

    def forward(self, images: Tensor) -> Tensor:
        """Maps [B D h w], or [B D G h w] with the group kept."""
        self.map_size(*images.shape[-2:])
        x = _activated(self.lift(images))
        for layer in self.gconvs:
            x = _activated(layer(x))
        if self.pool_group:
            x = x.amax(dim=2)
            return x if self.pool is None else F.adaptive_max_pool2d(x, self.pool)
        if self.pool is None:
            return x
        pooled = F.adaptive_max_pool2d(x.flatten(1, 2), self.pool)
        return pooled.unflatten(1, x.shape[1:3])


def _activated(x: Tensor) -> Tensor:
    return F.relu(F.layer_norm(x, x.shape[1:]))


def _init(weight: Tensor) -> None:
    nn.init.normal_(weight, std=math.sqrt(2 / weight[0].numel()))
