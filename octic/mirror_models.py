"""The mirror-equivariant ViTs of "Flopping for FLOPs" (Bokman et al. 2025), registered with timm.

Under their published names, which end in `_LS` and are not those of the octic nets in
`octic.models`: `d2_deit_*_LS`, every block equivariant to the left-right mirroring and the
classifier invariant; `hybrid_deit_*_LS`, the first half of the blocks equivariant;
`d2_inv_early_deit_*_LS`, invariant after that half. `vit.models` has their plain twins
`deit_*_LS`. Each function takes any keyword of `OcticVisionTransformer`, to override its own.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from octic.vision_transformer import OcticVisionTransformer
from vit.models import build, default_cfg, size

FAMILIES = ("d2", "hybrid", "d2_inv_early")
NAMES = (
    *("tiny_patch16", "small_patch16", "medium_patch16", "base_patch16", "large_patch16"),
    *("huge_patch14", "huge_patch14_52"),
)
MIRROR = {
    "group": "mirror",
    "qkv_bias": True,
    "init_values": 1e-4,
    "octic_norm_eps": 1e-6,
    "scaled_patch_bias": True,
    "cls_token_std": 0.02,
    "pos_embed_std": 0.02,
}
# All blocks equivariant; invariant="power_spectrum" is the published --symmetrized-asym-feats.
EQUIVARIANT = {**MIRROR, "invariant": "trivial", "invariant_at": "head"}
HYBRID = {**MIRROR, "switch_basis": "regular"}
INVARIANT = {**MIRROR, "invariant": "power_spectrum", "invariant_proj": False}

default_cfgs = generate_default_cfgs(
    {
        f"{family}_deit_{name}_LS": default_cfg("patch_embed.lift8.conv_A1", 1000)
        for family in FAMILIES
        for name in NAMES
    }
)


def _mirror(name: str, pretrained: bool, *presets: dict[str, Any]) -> nn.Module:
    merged = {key: value for preset in presets for key, value in preset.items()}
    return build(OcticVisionTransformer, name, pretrained, **merged)


@register_model
def d2_deit_tiny_patch16_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-equivariant DeiT III ViT-Ti/16."""
    presets = (size("tiny"), EQUIVARIANT, kwargs)
    return _mirror("d2_deit_tiny_patch16_LS", pretrained, *presets)


@register_model
def d2_deit_small_patch16_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-equivariant DeiT III ViT-S/16."""
    presets = (size("small"), EQUIVARIANT, kwargs)
    return _mirror("d2_deit_small_patch16_LS", pretrained, *presets)


@register_model
def d2_deit_medium_patch16_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-equivariant DeiT III ViT-M/16."""
    presets = (size("medium"), EQUIVARIANT, kwargs)
    return _mirror("d2_deit_medium_patch16_LS", pretrained, *presets)


@register_model
def d2_deit_base_patch16_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-equivariant DeiT III ViT-B/16: 82.2 top-1 on ImageNet, read off a plot."""
    presets = (size("base"), EQUIVARIANT, kwargs)
    return _mirror("d2_deit_base_patch16_LS", pretrained, *presets)


@register_model
def d2_deit_large_patch16_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-equivariant DeiT III ViT-L/16: 83.4 top-1 on ImageNet, read off a plot."""
    presets = (size("large"), EQUIVARIANT, kwargs)
    return _mirror("d2_deit_large_patch16_LS", pretrained, *presets)


@register_model
def d2_deit_huge_patch14_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-equivariant DeiT III ViT-H/14: 84.4 top-1 on ImageNet, read off a plot."""
    presets = (size("huge"), {"patch_size": 14}, EQUIVARIANT, kwargs)
    return _mirror("d2_deit_huge_patch14_LS", pretrained, *presets)


@register_model
def d2_deit_huge_patch14_52_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-equivariant DeiT III ViT-H/14 of 52 blocks."""
    presets = (size("huge_52"), {"patch_size": 14}, EQUIVARIANT, kwargs)
    return _mirror("d2_deit_huge_patch14_52_LS", pretrained, *presets)


@register_model
def hybrid_deit_tiny_patch16_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror hybrid DeiT III ViT-Ti/16."""
    presets = (size("tiny"), HYBRID, kwargs)
    return _mirror("hybrid_deit_tiny_patch16_LS", pretrained, *presets)


@register_model
def hybrid_deit_small_patch16_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror hybrid DeiT III ViT-S/16."""
    presets = (size("small"), HYBRID, kwargs)
    return _mirror("hybrid_deit_small_patch16_LS", pretrained, *presets)


@register_model
def hybrid_deit_medium_patch16_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror hybrid DeiT III ViT-M/16."""
    presets = (size("medium"), HYBRID, kwargs)
    return _mirror("hybrid_deit_medium_patch16_LS", pretrained, *presets)


@register_model
def hybrid_deit_base_patch16_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror hybrid DeiT III ViT-B/16: 83.0 top-1 on ImageNet, read off a plot."""
    presets = (size("base"), HYBRID, kwargs)
    return _mirror("hybrid_deit_base_patch16_LS", pretrained, *presets)


@register_model
def hybrid_deit_large_patch16_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror hybrid DeiT III ViT-L/16: 84.5 top-1 on ImageNet, read off a plot."""
    presets = (size("large"), HYBRID, kwargs)
    return _mirror("hybrid_deit_large_patch16_LS", pretrained, *presets)


@register_model
def hybrid_deit_huge_patch14_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror hybrid DeiT III ViT-H/14: 85.0 top-1 on ImageNet, read off a plot."""
    presets = (size("huge"), {"patch_size": 14}, HYBRID, kwargs)
    return _mirror("hybrid_deit_huge_patch14_LS", pretrained, *presets)


@register_model
def hybrid_deit_huge_patch14_52_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror hybrid DeiT III ViT-H/14 of 52 blocks."""
    presets = (size("huge_52"), {"patch_size": 14}, HYBRID, kwargs)
    return _mirror("hybrid_deit_huge_patch14_52_LS", pretrained, *presets)


@register_model
def d2_inv_early_deit_tiny_patch16_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-invariant DeiT III ViT-Ti/16."""
    presets = (size("tiny"), INVARIANT, kwargs)
    return _mirror("d2_inv_early_deit_tiny_patch16_LS", pretrained, *presets)


@register_model
def d2_inv_early_deit_small_patch16_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-invariant DeiT III ViT-S/16."""
    presets = (size("small"), INVARIANT, kwargs)
    return _mirror("d2_inv_early_deit_small_patch16_LS", pretrained, *presets)


@register_model
def d2_inv_early_deit_medium_patch16_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-invariant DeiT III ViT-M/16."""
    presets = (size("medium"), INVARIANT, kwargs)
    return _mirror("d2_inv_early_deit_medium_patch16_LS", pretrained, *presets)


@register_model
def d2_inv_early_deit_base_patch16_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-invariant DeiT III ViT-B/16."""
    presets = (size("base"), INVARIANT, kwargs)
    return _mirror("d2_inv_early_deit_base_patch16_LS", pretrained, *presets)


@register_model
def d2_inv_early_deit_large_patch16_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-invariant DeiT III ViT-L/16."""
    presets = (size("large"), INVARIANT, kwargs)
    return _mirror("d2_inv_early_deit_large_patch16_LS", pretrained, *presets)


@register_model
def d2_inv_early_deit_huge_patch14_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-invariant DeiT III ViT-H/14."""
    presets = (size("huge"), {"patch_size": 14}, INVARIANT, kwargs)
    return _mirror("d2_inv_early_deit_huge_patch14_LS", pretrained, *presets)


@register_model
def d2_inv_early_deit_huge_patch14_52_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-invariant DeiT III ViT-H/14 of 52 blocks."""
    presets = (size("huge_52"), {"patch_size": 14}, INVARIANT, kwargs)
    return _mirror("d2_inv_early_deit_huge_patch14_52_LS", pretrained, *presets)
