"""The plain Vision Transformer in its DeiT III and DINOv2 spelling.

DeiT III (Touvron et al. 2022): the class token has no position. DINOv2 (Oquab et al. 2023): it has
one, there are a mask token and optional registers, and positions of other grids are resampled
with a size offset of 0.1.
"""

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from vit.block import Block
from vit.initialisation import init_convolution, init_linear
from vit.stochastic_depth import drop_path_rates
from vit.trunk import Trunk


class VisionTransformer(Trunk):
    """Plain ViT; see the constructor for the options, `vit.models` for the usual sizes."""

    block_class: type[nn.Module] = Block

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        class_position: bool = False,
        num_register_tokens: int = 0,
        mask_token: bool = False,
        position_offset: float = 0.0,
        position_antialias: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = True,
        drop_path_mode: str = "sample",
        norm_eps: float = 1e-6,
        cls_token_std: float = 0.02,
        dynamic_img_size: bool = True,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=depth,
            class_token=class_token,
            num_register_tokens=num_register_tokens,
            drop_rate=drop_rate,
            dynamic_img_size=dynamic_img_size,
        )
        if class_position and not class_token:
            raise ValueError("class_position needs class_token")
        self.position_offset = position_offset
        self.position_antialias = position_antialias
        self.cls_token_std = cls_token_std
        self.patch_embed = PatchEmbed(
            self.img_size,
            patch_size,
            in_chans,
            embed_dim,
            flatten=False,
            output_fmt="NHWC",
            strict_img_size=False,
        )
        positions = self.grid_size[0] * self.grid_size[1] + int(class_position)
        self.pos_embed = nn.Parameter(torch.empty(1, positions, embed_dim))
        self._make_tokens(embed_dim, mask_token=mask_token)
        self.blocks = nn.ModuleList(
            self.block_class(
                embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                init_values=init_values,
                attn_drop=attn_drop_rate,
                norm_eps=norm_eps,
                drop_path_rate=rate,
                drop_path_mode=drop_path_mode,
                attention_backend=attention_backend,
            )
            for rate in drop_path_rates(drop_path_rate, depth, drop_path_uniform)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise linear layers, filters, positions and tokens; keep norms and scales."""
        self.apply(init_linear)
        init_convolution(self.patch_embed.proj.weight, self.patch_embed.proj.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self._init_tokens(self.cls_token_std)

    def class_position(self) -> Tensor | None:
        """Position of the class token [1 1 D]: the first row of `pos_embed`, where it has one."""
        cells = self.grid_size[0] * self.grid_size[1]
        return self.pos_embed[:, :1] if self.pos_embed.shape[1] > cells else None

    def patch_positions(self, height: int, width: int) -> Tensor:
        """Positions [1 N D] of a grid of h x w patches, resampled where it is another grid."""
        cells = self.grid_size[0] * self.grid_size[1]
        positions = self.pos_embed[:, -cells:]
        if (height, width) == self.grid_size:
            return positions
        grid = positions.unflatten(1, self.grid_size)
        return resample_grid(
            grid, (height, width), offset=self.position_offset, antialias=self.position_antialias
        ).flatten(1, 2)


def resample_grid(
    grid: Tensor, size: tuple[int, int], *, offset: float = 0.0, antialias: bool = False
) -> Tensor:
    """Bicubic resampling of embeddings [1 h w D] to another grid, in float32 at least.

    offset: added to the new size before the scale is computed; DINOv2 uses 0.1.
    """
    channels_first = grid.permute(0, 3, 1, 2)
    if grid.dtype in (torch.float16, torch.bfloat16):
        channels_first = channels_first.float()
    if offset:
        scale = tuple((new + offset) / old for new, old in zip(size, grid.shape[1:3], strict=True))
        resampled = F.interpolate(
            channels_first, scale_factor=scale, mode="bicubic", antialias=antialias
        )
    else:
        resampled = F.interpolate(channels_first, size=size, mode="bicubic", antialias=antialias)
    return resampled.permute(0, 2, 3, 1).to(grid.dtype)
