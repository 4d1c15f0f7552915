"""Convolutions between mirror features; half of each filter is trained, the rest mirrors it.

Bokman et al. 2025, "Flopping for FLOPs". Mirror features are channels-last, [B h w D], their
channels [even | odd]: a mirrored image mirrors their columns and negates the odd half. A filter
that is symmetric under the mirror maps even to even and odd to odd; an antisymmetric one swaps the
two.

Letters: B images, h w places, D channels, C = D/2 of each half, k the side of a filter.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octic.groups import get_group
from octic.layers import OcticLinear, channels_per_copy
from octic.patch_embed import OcticLift
from utils.ranges import check_word

MIRROR = get_group("mirror")
DEPTHWISE = ("full", "symmetric")


class MirrorLift(OcticLift):
    """Images [B in H W] to mirror features: the lift of `octic` for the mirror group.

    Filters and bias carry the factor sqrt(1/2).
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        patch_size: int | tuple[int, int],
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(in_chans, embed_dim, patch_size, bias=bias, scaled_bias=True, group=MIRROR)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B in H W] to features [B H/p W/p D]."""
        return super().forward(images).permute(0, 2, 3, 1)


class HalfFilter(nn.Module):
    """Filters symmetric or antisymmetric under the mirror, of which the left half is trained.

    weight [out in k columns]: with an odd width a symmetric filter's centre column belongs to it,
    an antisymmetric one's is zero.
    """

    def __init__(
        self,
        out_chans: int,
        in_chans: int,
        kernel_size: tuple[int, int],
        *,
        symmetric: bool,
        bias: bool = False,
    ) -> None:
        super().__init__()
        height, self.width = kernel_size
        self.symmetric = symmetric
        columns = (self.width + int(symmetric)) // 2
        if columns < 1:
            raise ValueError(f"an antisymmetric filter {height} x {self.width} is zero; 2 or wider")
        self.weight = nn.Parameter(torch.empty(out_chans, in_chans, height, columns))
        self.bias = nn.Parameter(torch.empty(out_chans)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights of deviation 0.02, zero biases."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def full(self) -> Tensor:
        """The full filters [out in k k]."""
        left = self.weight
        if self.width % 2 == 0:
            right = left.flip(-1)
            return torch.cat([left, right if self.symmetric else -right], dim=-1)
        if self.symmetric:
            return torch.cat([left, left[..., :-1].flip(-1)], dim=-1)
        return torch.cat([left, torch.zeros_like(left[..., :1]), -left.flip(-1)], dim=-1)


class MirrorDepthwiseConv(nn.Module):
    """Depthwise convolution of mirror features [B h w D], f(g x) = g f(x).

    full: each half is split in two; its first quarters go, by a symmetric and an antisymmetric
    filter, into the even half, its second quarters into the odd one. symmetric: even stays even,
    odd stays odd, with symmetric filters only.
    """

    def __init__(self, dim: int, *, kernel_size: int = 7, mixing: str = "full") -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"the depthwise kernel's side must be odd, not {kernel_size}")
        check_word("depthwise", mixing, DEPTHWISE)
        parts = 4 if mixing == "full" else 2
        if dim % parts:
            nearest = max(1, round(dim / parts)) * parts
            raise ValueError(
                f"width {dim} is not a multiple of {parts}, as a depthwise convolution of mirror "
                f"features needs; nearest: {nearest}"
            )
        self.dim, self.mixing, self.kernel_size = dim, mixing, kernel_size

        def filters(symmetric: bool, bias: bool) -> HalfFilter:
            sides = (kernel_size, kernel_size)
            return HalfFilter(dim // parts, 1, sides, symmetric=symmetric, bias=bias)

        self.sym_to_sym = filters(True, True)
        if mixing == "full":
            self.sym_to_asym = filters(False, False)
            self.asym_to_sym = filters(False, True)
        self.asym_to_asym = filters(True, False)

    def filters(self) -> Tensor:
        """The filter of each channel [D 1 k k], in the order of the inputs."""
        return torch.cat([cast(HalfFilter, part).full() for part in self.children()])

    def forward(self, x: Tensor) -> Tensor:
        """Convolve features [B h w D] with zeros around them."""
        parts = [cast(HalfFilter, part) for part in self.children()]
        bias = _side_by_side(parts)
        padding = self.kernel_size // 2
        maps = x.permute(0, 3, 1, 2)
        y = F.conv2d(maps, self.filters(), bias, padding=padding, groups=self.dim)
        y = y.permute(0, 2, 3, 1)
        if self.mixing == "symmetric":
            return y
        # The quarters come out as even, odd, even, odd.
        return y.unflatten(-1, (2, 2, -1)).transpose(-3, -2).flatten(-3)


class MirrorDownsample(nn.Module):
    """2 x 2 convolution of stride 2, [B h w D] to [B h/2 w/2 D'], f(g x) = g f(x).

    The law needs an even number of columns. allow_odd: accept others, and drop the last column.
    """

    def __init__(self, in_dim: int, out_dim: int, *, allow_odd: bool = False) -> None:
        super().__init__()
        self.allow_odd = allow_odd
        in_copy, out_copy = channels_per_copy(in_dim, MIRROR), channels_per_copy(out_dim, MIRROR)

        def filters(symmetric: bool, bias: bool = False) -> HalfFilter:
            return HalfFilter(out_copy, in_copy, (2, 2), symmetric=symmetric, bias=bias)

        self.sym_to_sym = filters(True, bias=True)
        self.sym_to_asym = filters(False)
        self.asym_to_sym = filters(False)
        self.asym_to_asym = filters(True)

    def filters(self) -> Tensor:
        """The full filters [D' D 2 2]."""
        even = torch.cat([self.sym_to_sym.full(), self.asym_to_sym.full()], dim=1)
        odd = torch.cat([self.sym_to_asym.full(), self.asym_to_asym.full()], dim=1)
        return torch.cat([even, odd])

    def forward(self, x: Tensor) -> Tensor:
        """Convolve features [B h w D]; ValueError for an odd number of columns."""
        _check_even(x, self.allow_odd)
        bias = _side_by_side([self.sym_to_sym, self.sym_to_asym])
        y = F.conv2d(x.permute(0, 3, 1, 2), self.filters(), bias, stride=2)
        return y.permute(0, 2, 3, 1)


class MeanDownsample(nn.Module):
    """Mean of 2 x 2 places, then a linear layer: [B h w D] to [B h/2 w/2 D'], f(g x) = g f(x).

    Columns as of `MirrorDownsample`.
    """

    def __init__(self, in_dim: int, out_dim: int, *, allow_odd: bool = False) -> None:
        super().__init__()
        self.allow_odd = allow_odd
        self.linear = OcticLinear(in_dim, out_dim, group=MIRROR)

    def forward(self, x: Tensor) -> Tensor:
        """Reduce features [B h w D]; ValueError for an odd number of columns."""
        _check_even(x, self.allow_odd)
        return self.linear(F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1))


def _side_by_side(parts: list[HalfFilter]) -> Tensor:
    """One bias for all channels; zero for a part without bias."""
    return torch.cat(
        [
            part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias
            for part in parts
        ]
    )


def _check_even(x: Tensor, allow_odd: bool) -> None:
    if x.shape[2] % 2 and not allow_odd:
        raise ValueError(
            f"a grid of {x.shape[1]} x {x.shape[2]} places cannot be halved with its mirror "
            "symmetry kept: the number of columns must be even"
        )
