"""The SWAG ViTs under timm: B/16 at 384, L/16 at 512, H/14 at 518 pixels (Singh et al. 2022).

"Revisiting Weakly Supervised Pre-Training of Visual Perception Models". Registered as
`swag_vit_b16_in1k`, `swag_vit_l16_in1k`, `swag_vit_h14_in1k`. Files in SWAG's own layout,
torchvision's and timm's load strictly by `vit.weights.load_weights`; positions of another grid are
resized.

Letters in shapes: B images, N tokens with the class token, g side of the grid, D channels.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from vit.backbone import Features, check_whole_patches, features_of_intermediates, take_indices
from vit.keys import renamed, strip_wrappers
from vit.models import build, entrypoint

# name -> constructor keywords
SWAG: dict[str, dict[str, Any]] = {
    "swag_vit_b16_in1k": {
        **{"img_size": 384, "patch_size": 16},
        **{"embed_dim": 768, "depth": 12, "num_heads": 12},
    },
    "swag_vit_l16_in1k": {
        **{"img_size": 512, "patch_size": 16},
        **{"embed_dim": 1024, "depth": 24, "num_heads": 16},
    },
    "swag_vit_h14_in1k": {
        **{"img_size": 518, "patch_size": 14},
        **{"embed_dim": 1280, "depth": 32, "num_heads": 16},
    },
}

# SWAG's and torchvision's spellings -> timm's.
_WORDS = {
    r"^class_token$": "cls_token",
    r"^encoder\.pos_embedding$": "pos_embed",
    r"^conv_proj\.": "patch_embed.proj.",
    r"^encoder\.layers\.(?:encoder_)?layer_(\d+)\.": r"blocks.\1.",
    r"^encoder\.ln\.": "norm.",
    r"^(?:head\.layers|heads)\.head\.": "head.",
    r"^(blocks\.\d+)\.ln_([12])\.": r"\1.norm\2.",
    r"^(blocks\.\d+)\.self_attention\.in_proj_": r"\1.attn.qkv.",
    r"^(blocks\.\d+)\.self_attention\.out_proj\.": r"\1.attn.proj.",
    r"^(blocks\.\d+)\.mlp\.(?:linear_1|0)\.": r"\1.mlp.fc1.",
    r"^(blocks\.\d+)\.mlp\.(?:linear_2|3)\.": r"\1.mlp.fc2.",
}


class SwagVisionTransformer(VisionTransformer):
    """timm's ViT with LayerNorm eps 1e-6, biases and a class token, which reads SWAG's files.

    Takes timm's keywords. `class_token=False, global_pool="avg", fc_norm=False` is SWAG's
    `classifier="gap"`. Images have the size `img_size` exactly, as published.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.depth = len(self.blocks)
        self.patch_size: int = self.patch_embed.patch_size[0]
        self.img_size: tuple[int, int] = self.patch_embed.img_size
        check_whole_patches(self.img_size, self.patch_size, "img_size")

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.patch_embed.grid_size
        return height, width

    def rename_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights in SWAG's, torchvision's or timm's layout, for this model.

        Positions of another square grid are resized, in a copy: `state` stays as it is. ValueError
        where they are no square grid.
        """
        found = swag_names(state)
        if "pos_embed" in found and self.pos_embed is not None:
            prefix = self.pos_embed.shape[1] - math.prod(self.grid_size)
            found["pos_embed"] = resize_positions(found["pos_embed"], self.grid_size, prefix)
        return found

    def features(self, images: Tensor, layers: Sequence[int] = (-1,)) -> list[Features]:
        """Features of the asked blocks after the final norm (Backbone contract)."""
        indices = take_indices(layers, self.depth)
        options = {"return_prefix_tokens": True, "norm": True, "stop_early": True}
        return features_of_intermediates(self, images, indices, **options)


def swag_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in SWAG's, torchvision's or timm's layout under timm's names, positions [1 N D].

    The older `linear_1`, `linear_2` of torchvision's MLPs are read too.
    """

    def rename(name: str) -> str:
        ours = strip_wrappers(name)
        for pattern, word in _WORDS.items():
            ours = re.sub(pattern, word, ours)
        return ours

    found = renamed(state, rename)
    positions = found.get("pos_embed")
    # SWAG keeps its positions with the tokens first [N 1 D].
    if positions is not None and positions.ndim == 3 and positions.shape[1] == 1:
        found["pos_embed"] = positions.transpose(0, 1)
    return found


def resize_positions(positions: Tensor, grid: tuple[int, int], prefix: int = 1) -> Tensor:
    """Positions [1 prefix+g*g D] on another grid, bicubic with align_corners=True, as published.

    The first `prefix` rows, such as the class token's, stay. ValueError where the others are no
    square grid.
    """
    count = positions.shape[1] - prefix
    side = math.isqrt(max(count, 0))
    if (side, side) == grid or positions.ndim != 3:
        return positions
    if side * side != count or count < 1:
        raise ValueError(
            f"pos_embed of the file has {positions.shape[1]} positions, {prefix} of them not a "
            "patch's: the others are no square grid of patches"
        )
    first, patches = positions[:, :prefix], positions[:, prefix:]
    maps = patches.transpose(1, 2).unflatten(2, (side, side))
    resized = F.interpolate(maps, size=grid, mode="bicubic", align_corners=True)
    return torch.cat([first, resized.flatten(2).transpose(1, 2)], dim=1)


def _swag(name: str, description: str) -> Callable[..., nn.Module]:
    make = partial(build, SwagVisionTransformer)
    cfg = {"fixed_input_size": True, "license": "cc-by-nc-4.0"}
    return entrypoint(__name__, make, cfg, name, description, **SWAG[name])


swag_vit_b16_in1k = _swag("swag_vit_b16_in1k", "ViT-B/16 at 384 pixels: 85.304 top-1 on ImageNet.")
swag_vit_l16_in1k = _swag("swag_vit_l16_in1k", "ViT-L/16 at 512 pixels: 88.064 top-1 on ImageNet.")
swag_vit_h14_in1k = _swag("swag_vit_h14_in1k", "ViT-H/14 at 518 pixels: 88.552 top-1 on ImageNet.")
