"""The plain twins of the mirror nets: ResMLP and ConvNeXt of timm's parts, each a Backbone."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast

import torch
from timm.layers import LayerNorm2d
from timm.models.convnext import ConvNeXtBlock
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.flopping.convnext import EPS, ConvNeXt, check_stages
from baselines.flopping.keys import plain_convnext_names, plain_resmlp_names
from baselines.flopping.net import check_drop_path
from baselines.flopping.resmlp import check_own_size
from utils.ranges import check_counts
from vit.backbone import (
    Features,
    check_pool,
    check_whole_patches,
    features_of_intermediates,
    sides_of,
    take_indices,
)
from vit.initialisation import init_convolution, init_linear


class PlainResMlp(MlpMixer):
    """timm's ResMLP with features for probes and with loading of published files.

    drop_rate: of the dropout before the classifier, as in timm. Departs from Flopping for FLOPs,
    whose option of that name drops within the MLPs; it is 0 in all its runs.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        init_values: float = 1e-4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        check_drop_path(drop_path_rate)
        check_counts(1, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, depth=depth)
        height, width = sides_of(img_size)
        check_whole_patches((height, width), patch_size)
        super().__init__(
            img_size=cast(int, img_size),  # oblong too, whatever its annotation says
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            num_blocks=depth,
            mlp_ratio=mlp_ratio,
            block_layer=ResBlock,
            norm_layer=Affine,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            global_pool=check_pool(global_pool),
        )
        self.img_size, self.patch_size, self.depth = (height, width), patch_size, depth
        for name, parameter in self.named_parameters():
            if name.endswith((".ls1", ".ls2")):
                nn.init.constant_(parameter, init_values)
        # Departs from timm's initialisation: as in DeiT and Flopping for FLOPs.
        self.apply(init_linear)
        init_convolution(self.stem.proj.weight, self.stem.proj.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens [B N D] after the final norm; ValueError for images of another size."""
        check_own_size(x.shape[-2:], self.img_size)
        return super().forward_features(x)

    def features(self, images: Tensor, layers: Sequence[int] = (-1,)) -> list[Features]:
        """Normalised features of the asked blocks; the class token is the mean one (Backbone)."""
        check_own_size(images.shape[-2:], self.img_size)
        indices = take_indices(layers, self.depth)
        return features_of_intermediates(self, images, indices, norm=True)

    def no_weight_decay(self) -> set[str]:
        """The affine layers' gains and shifts, which timm stores as [1 1 D].

        Their mirror-equivariant counterparts are vectors, which no recipe decays.
        """
        return {n for n, _ in self.named_parameters() if n.endswith((".alpha", ".beta"))}

    def rename_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights in the published spelling under our names; others as they are."""
        return plain_resmlp_names(state)


class MeanPoolLinear(nn.Module):
    """Mean of 2 x 2 places, then a linear layer: maps [B D h w] to [B D' h/2 w/2]."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Reduce a map."""
        return self.linear(F.avg_pool2d(x, 2).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PlainConvNeXt(ConvNeXt):
    """ConvNeXt of timm's blocks, hierarchical or, with a single stage, isotropic.

    Departs from Flopping for FLOPs: the layer scale is a vector, which no recipe decays, as that of
    the mirror-equivariant ConvNeXt; the published plain one was decayed, the published equivariant
    one was not. Maps are channels-last in memory, as in the mirror-equivariant net.
    """

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
        downsampling: str = "conv",
    ) -> None:
        check_drop_path(drop_path_rate)
        check_stages(depths, dims, downsampling)
        if kernel_size % 2 == 0:
            raise ValueError(f"the depthwise kernel's side must be odd, not {kernel_size}")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            dims=dims,
            depths=depths,
            num_features=dims[-1],
            drop_rate=drop_rate,
            global_pool=global_pool,
        )
        self.stem = nn.Conv2d(in_chans, dims[0], patch_size, patch_size)
        by_conv = partial(nn.Conv2d, kernel_size=2, stride=2)
        self.build_stages(
            depths,
            dims,
            norm=partial(LayerNorm2d, eps=EPS),
            downsample=by_conv if downsampling == "conv" else MeanPoolLinear,
            block=partial(
                ConvNeXtBlock,
                kernel_size=kernel_size,
                mlp_ratio=mlp_ratio,
                ls_init_value=init_values or None,
            ),
            drop_path_rate=drop_path_rate,
        )
        self.norm = nn.LayerNorm(dims[-1], eps=EPS)
        self.apply(_init_weights)
        self.scale_head(head_init_scale)

    def embed(self, images: Tensor) -> Tensor:
        """Images to a map [B D h w]."""
        return self.stem(images.contiguous(memory_format=torch.channels_last))

    def vector(self, x: Tensor) -> Tensor:
        """What the classifier reads [B F]: the mean, normalised."""
        return self.norm(x.mean((2, 3)))

    def patch_map(self, x: Tensor) -> Tensor:
        """Each place [B h w F] after the final norm."""
        return self.norm(x.permute(0, 2, 3, 1))

    def full_map(self, x: Tensor) -> Tensor:
        """The map, channels last."""
        return x.permute(0, 2, 3, 1)

    def rename_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights in the published spelling under our names; others as they are."""
        return plain_convnext_names(state)


def _init_weights(layer: nn.Module) -> None:
    init_linear(layer)
    if isinstance(layer, nn.Conv2d):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
