"""ConvNeXt whose layers are mirror-equivariant: hierarchical, or isotropic with a single stage.

Bokman et al. 2025, "Flopping for FLOPs" (`ConvNeXt2`, `ConvNeXtIsotropic2`); Liu et al. 2022, "A
ConvNet for the 2020s". Features are channels-last throughout, [B h w D] with channels [even | odd],
so that the pointwise layers are those of `octic`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.flopping.activation import RegularActivation
from baselines.flopping.filters import (
    MIRROR,
    MeanDownsample,
    MirrorDepthwiseConv,
    MirrorDownsample,
    MirrorLift,
)
from baselines.flopping.keys import mirror_convnext_names
from baselines.flopping.net import Net, Stage, check_drop_path
from octic.expansion import slots
from octic.invariants import make_invariantization
from octic.layers import OcticLayerNorm, OcticLinear, OcticScale
from utils.ranges import check_count, check_word
from vit.initialisation import init_linear

DOWNSAMPLING = {"conv": MirrorDownsample, "mean": MeanDownsample}
EPS = 1e-6


class MirrorConvNeXtBlock(nn.Module):
    """x + gamma(pwconv2(act(pwconv1(norm(dwconv x))))); block(g x) = g block(x)."""

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float = 4.0,
        init_values: float | None = 1e-6,
        drop_path: float = 0.0,
        kernel_size: int = 7,
        depthwise: str = "full",
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.dwconv = MirrorDepthwiseConv(dim, kernel_size=kernel_size, mixing=depthwise)
        self.norm = OcticLayerNorm(dim, eps=EPS, group=MIRROR)
        self.pwconv1 = OcticLinear(dim, hidden, group=MIRROR)
        self.act = RegularActivation(activation)
        self.pwconv2 = OcticLinear(hidden, dim, group=MIRROR)
        self.gamma = OcticScale(dim, init_values, group=MIRROR) if init_values else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, even_only: bool = False) -> Tensor:
        """Map features [B h w D] to features, or only to their even half [B h w C]."""
        y = self.act(self.pwconv1(self.norm(self.dwconv(x))))
        if not even_only:
            return x + self.drop_path(self.gamma(self.pwconv2(y)))
        even, odd = self.pwconv2.lin_A1, self.pwconv2.lin_A2
        branch = F.linear(y[..., : even.in_features], even.weight, even.bias)
        unread = [odd.weight]
        if isinstance(self.gamma, OcticScale):
            branch = branch * self.gamma.alpha_A1
            unread.append(self.gamma.alpha_A2)
        if torch.is_grad_enabled():
            # Unused parameters get a gradient of zero, not None.
            branch = branch + 0 * sum(parameter.sum() for parameter in unread)
        return x[..., : even.out_features] + self.drop_path(branch)


class ConvNeXt(Net):
    """Shared by the mirror-equivariant ConvNeXt and its plain twin: stages, fresh head."""

    entries: nn.ModuleList
    stages: nn.ModuleList

    def build_stages(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        *,
        norm: Callable[[int], nn.Module],
        downsample: Callable[[int, int], nn.Module],
        block: Callable[..., nn.Module],
        drop_path_rate: float,
    ) -> None:
        """Build entries and blocks; a single stage has no norm before it."""
        pairs = zip(dims, dims[1:], strict=False)
        later = (nn.Sequential(norm(old), downsample(old, new)) for old, new in pairs)
        self.entries = nn.ModuleList([norm(dims[0]) if len(dims) > 1 else nn.Identity(), *later])
        rates = cast(
            list[list[float]],
            calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True),
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(block(dim, drop_path=rate) for rate in of_stage)
            for dim, of_stage in zip(dims, rates, strict=True)
        )

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all stages."""
        return [block for stage in self.stages.children() for block in stage.children()]

    def path(self) -> list[Stage]:
        """The stages, each with its norm and downsampling before it."""
        return [
            Stage(entry, list(blocks))
            for entry, blocks in zip(self.entries, self.stages, strict=True)
        ]

    def scale_head(self, factor: float) -> None:
        """Multiply a fresh classifier's weight and bias."""
        if isinstance(self.head, nn.Linear) and factor != 1.0:
            self.head.weight.data.mul_(factor)
            self.head.bias.data.mul_(factor)


class MirrorConvNeXt(ConvNeXt):
    """ConvNeXt with f(mirrored image) = f(image), for widths that are multiples of the reduction.

    depths, dims: blocks and width of each stage; one stage is the isotropic ConvNeXt, whose stem
        has no norm.
    init_values: of the layer scale; None or 0 for none.
    invariant: what the classifier reads of the channels, `trivial` (the even half) or
        `power_spectrum` (with the absolute odd half, `use_symmetrized_asym_feats`); see `octic`.
    depthwise: full or symmetric, see `MirrorDepthwiseConv`. downsampling: conv or mean.
    allow_odd: accept images of any width, as published; the law may not hold there.
    drop_path_rate: of the last block, rising from zero.
    """

    # Read by the report on equivariance: the symmetries that must not change the final features.
    group = MIRROR
    switch = 0

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        mlp_ratio: float = 4.0,
        kernel_size: int = 7,
        init_values: float | None = 1e-6,
        head_init_scale: float = 1.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        invariant: str = "trivial",
        activation: str = "gelu",
        depthwise: str = "full",
        downsampling: str = "conv",
        allow_odd: bool = False,
    ) -> None:
        check_drop_path(drop_path_rate)
        check_stages(depths, dims, downsampling)
        invariantization = make_invariantization(invariant, dims[-1], MIRROR)
        self._allow_odd = allow_odd  # before the base class, which checks img_size
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            dims=dims,
            depths=depths,
            num_features=invariantization.output_dim,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )
        self.stem = MirrorLift(in_chans, dims[0], patch_size)
        self.build_stages(
            depths,
            dims,
            norm=partial(OcticLayerNorm, eps=EPS, group=MIRROR),
            downsample=partial(DOWNSAMPLING[downsampling], allow_odd=allow_odd),
            block=partial(
                MirrorConvNeXtBlock,
                mlp_ratio=mlp_ratio,
                init_values=init_values,
                kernel_size=kernel_size,
                depthwise=depthwise,
                activation=activation,
            ),
            drop_path_rate=drop_path_rate,
        )
        self.invariant, self.invariantization = invariant, invariantization
        self.norm = nn.LayerNorm(invariantization.output_dim, eps=EPS)
        self.init_weights(head_init_scale)

    def init_weights(self, head_init_scale: float = 1.0) -> None:
        """Initialise all weights: truncated normal of deviation 0.02, also halves of filters."""
        self.apply(init_linear)
        for slot in slots(MIRROR):
            half = self.stem.get_submodule(f"conv_{slot.name}")
            nn.init.trunc_normal_(half.weight, std=0.02)
            if half.bias is not None:
                nn.init.zeros_(half.bias)
        self.scale_head(head_init_scale)

    def check_size(self, height: int, width: int) -> None:
        """ValueError for images whose columns a strided convolution would divide unevenly."""
        super().check_size(height, width)
        if width % self.patch_size and not self._allow_odd:
            raise ValueError(
                f"image size {height} x {width}: the width must be a multiple of "
                f"{self.patch_size} for the mirror symmetry to be kept"
            )

    def embed(self, images: Tensor) -> Tensor:
        """Images to features [B h w D]."""
        return self.stem(images)

    def vector(self, x: Tensor) -> Tensor:
        """What the classifier reads [B F]: the mean of the invariants, normalised."""
        return self.norm(self.invariantization(x).mean((1, 2)))

    def read(self, block: nn.Module, x: Tensor) -> Tensor:
        """What the classifier reads; the last block computes only the even half if that is all."""
        if self.invariant != "trivial":
            return super().read(block, x)
        return self.norm(self._through_one(block, x, even_only=True).mean((1, 2)))

    def patch_map(self, x: Tensor) -> Tensor:
        """The invariants of each place [B h w F], after the final norm."""
        return self.norm(self.invariantization(x))

    def full_map(self, x: Tensor) -> Tensor:
        """Features as they are; a mirrored image mirrors them and negates the odd half."""
        return x

    def rename_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights in the published spelling under our names; others as they are."""
        return mirror_convnext_names(state)


def check_stages(depths: Sequence[int], dims: Sequence[int], downsampling: str) -> None:
    """ValueError if depths and widths differ in length, and for an unknown downsampling."""
    if len(depths) != len(dims) or not depths:
        raise ValueError(f"depths {tuple(depths)} and dims {tuple(dims)} are not of equal length")
    for depth in depths:
        check_count("depths", depth)
    check_word("downsampling", downsampling, DOWNSAMPLING)
