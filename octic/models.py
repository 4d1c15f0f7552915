"""Octic ViTs under their published names, registered with timm, with S and B sizes beside them.

`hybrid_*`: octic first half, plain second half. `d8_inv_early_*`: invariant after the octic half.
Each function takes any keyword of `OcticVisionTransformer`, to override its own.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from octic.vision_transformer import OcticVisionTransformer
from vit.models import DEIT, build, default_cfg, size

# Departs from octic-vits: layer scale starts at 1e-5 as its configs ask, where the released code
# silently takes 1e-4; init_values=1e-4 is the released behaviour.
DINOV2 = {
    "qkv_bias": True,
    "init_values": 1e-5,
    "mask_token": True,
    "cls_token_std": 1e-6,
    "drop_path_mode": "subset",
    "num_classes": 0,
}
# The released invariant DeiT III checkpoints carry polynomials, though the released code builds
# the power spectrum; `vit.weights.load_weights` says which a file needs.
INVARIANT = {"invariant": "power_spectrum"}

default_cfgs = generate_default_cfgs(
    {
        **{
            f"{family}_deit_{name}": default_cfg("patch_embed.lift8.conv_A1", 1000)
            for family in ("hybrid", "d8_inv_early")
            for name in ("small_patch16", "base_patch16", "large_patch16", "huge_patch14")
        },
        **{
            f"{family}_dinov2_vit_{name}_patch16": default_cfg("patch_embed.lift8.conv_A1", 0)
            for family in ("hybrid", "d8_inv_early")
            for name in ("small", "base", "large", "huge")
        },
    }
)


def _octic(name: str, pretrained: bool, *presets: dict[str, Any]) -> nn.Module:
    merged = {key: value for preset in presets for key, value in preset.items()}
    return build(OcticVisionTransformer, name, pretrained, **merged)


@register_model
def hybrid_deit_small_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Hybrid DeiT III ViT-S/16."""
    presets = (size("small"), DEIT)
    return _octic("hybrid_deit_small_patch16", pretrained, *presets, kwargs)


@register_model
def hybrid_deit_base_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Hybrid DeiT III ViT-B/16."""
    presets = (size("base"), DEIT)
    return _octic("hybrid_deit_base_patch16", pretrained, *presets, kwargs)


@register_model
def hybrid_deit_large_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Hybrid DeiT III ViT-L/16: 84.5 top-1 on ImageNet as published."""
    presets = (size("large"), DEIT)
    return _octic("hybrid_deit_large_patch16", pretrained, *presets, kwargs)


@register_model
def hybrid_deit_huge_patch14(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Hybrid DeiT III ViT-H/14: 85.0 top-1 on ImageNet as published."""
    presets = (size("huge"), {"patch_size": 14}, DEIT)
    return _octic("hybrid_deit_huge_patch14", pretrained, *presets, kwargs)


@register_model
def d8_inv_early_deit_small_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Invariant DeiT III ViT-S/16."""
    presets = (size("small"), DEIT, INVARIANT)
    return _octic("d8_inv_early_deit_small_patch16", pretrained, *presets, kwargs)


@register_model
def d8_inv_early_deit_base_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Invariant DeiT III ViT-B/16."""
    presets = (size("base"), DEIT, INVARIANT)
    return _octic("d8_inv_early_deit_base_patch16", pretrained, *presets, kwargs)


@register_model
def d8_inv_early_deit_large_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Invariant DeiT III ViT-L/16: 84.0 top-1 on ImageNet as published."""
    presets = (size("large"), DEIT, INVARIANT)
    return _octic("d8_inv_early_deit_large_patch16", pretrained, *presets, kwargs)


@register_model
def d8_inv_early_deit_huge_patch14(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Invariant DeiT III ViT-H/14: 84.7 top-1 on ImageNet as published."""
    presets = (size("huge"), {"patch_size": 14}, DEIT, INVARIANT)
    return _octic("d8_inv_early_deit_huge_patch14", pretrained, *presets, kwargs)


@register_model
def hybrid_dinov2_vit_small_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Hybrid DINOv2 ViT-S/16."""
    presets = (size("small"), DINOV2)
    return _octic("hybrid_dinov2_vit_small_patch16", pretrained, *presets, kwargs)


@register_model
def hybrid_dinov2_vit_base_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Hybrid DINOv2 ViT-B/16."""
    presets = (size("base"), DINOV2)
    return _octic("hybrid_dinov2_vit_base_patch16", pretrained, *presets, kwargs)


@register_model
def hybrid_dinov2_vit_large_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Hybrid DINOv2 ViT-L/16: 81.3 linear, 80.8 kNN as published."""
    presets = (size("large"), DINOV2)
    return _octic("hybrid_dinov2_vit_large_patch16", pretrained, *presets, kwargs)


@register_model
def hybrid_dinov2_vit_huge_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Hybrid DINOv2 ViT-H/16: 82.2 linear, 81.4 kNN as published."""
    presets = (size("huge"), DINOV2)
    return _octic("hybrid_dinov2_vit_huge_patch16", pretrained, *presets, kwargs)


@register_model
def d8_inv_early_dinov2_vit_small_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Invariant DINOv2 ViT-S/16."""
    presets = (size("small"), DINOV2, INVARIANT)
    return _octic("d8_inv_early_dinov2_vit_small_patch16", pretrained, *presets, kwargs)


@register_model
def d8_inv_early_dinov2_vit_base_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Invariant DINOv2 ViT-B/16."""
    presets = (size("base"), DINOV2, INVARIANT)
    return _octic("d8_inv_early_dinov2_vit_base_patch16", pretrained, *presets, kwargs)


@register_model
def d8_inv_early_dinov2_vit_large_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Invariant DINOv2 ViT-L/16: 81.2 linear, 80.4 kNN as published."""
    presets = (size("large"), DINOV2, INVARIANT)
    return _octic("d8_inv_early_dinov2_vit_large_patch16", pretrained, *presets, kwargs)


@register_model
def d8_inv_early_dinov2_vit_huge_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Invariant DINOv2 ViT-H/16: 81.9 linear, 80.9 kNN as published."""
    presets = (size("huge"), DINOV2, INVARIANT)
    return _octic("d8_inv_early_dinov2_vit_huge_patch16", pretrained, *presets, kwargs)
