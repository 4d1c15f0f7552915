"""Plain ViTs under their published names, registered with timm.

`deit_*_LS`: DeiT III, the plain twins of the octic and the mirror nets; without `_LS`: without
layer scale; `_36`: deeper; `_18x2`, `_26x2`: of parallel branches (Touvron et al. 2022, "Three
things everyone should know about Vision Transformers"). `dinov2_vit_*_patch16`: the plain DINOv2
baselines of octic-vits. Each function takes any keyword of `VisionTransformer`, to override its
own.
"""

from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from vit.finetune import adapt_state, head_of
from vit.parallel import ParallelVisionTransformer
from vit.vision_transformer import VisionTransformer

# name -> embed_dim, depth, num_heads
SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "medium": (512, 12, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
    "huge_52": (1280, 52, 16),
}


def size(name: str) -> dict[str, int]:
    """Constructor keywords of a size."""
    embed_dim, depth, num_heads = SIZES[name]
    return {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}


def default_cfg(first_conv: str, num_classes: int) -> dict[str, Any]:
    """timm's description of a model: input, normalisation, first and last layer."""
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": first_conv,
        "classifier": "head",
        "license": "apache-2.0",
    }


def filter_state(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook on loaded weights: published spellings become ours, adapted to this model.

    So timm's own call may ask for another number of classes or image size than the file's.
    ValueError as `adapt_state`, and for a head that would start afresh without having been asked.
    """
    adapted, notes = adapt_state(state, model)
    net: Any = model
    if net.num_classes == net.pretrained_cfg["num_classes"]:
        for note in notes:
            if note.startswith(head_of(net)):
                raise ValueError(f"the weights do not fit: {note}")
    return adapted


def build(
    model_class: Callable[..., nn.Module], name: str, pretrained: bool, **kwargs: Any
) -> nn.Module:
    """Build a registered model the way timm builds its own."""
    return build_model_with_cfg(
        model_class,
        name,
        pretrained,
        pretrained_filter_fn=filter_state,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        **{
            f"deit_{name}_LS": default_cfg("patch_embed.proj", 1000)
            for name in (
                *("tiny_patch16", "small_patch16", "medium_patch16", "base_patch16"),
                *("large_patch16", "huge_patch14", "huge_patch14_52"),
                *("small_patch16_36", "base_patch16_36x1", "small_patch16_18x2"),
                *("base_patch16_18x2", "huge_patch14_26x2"),
            )
        },
        **{
            f"deit_{name}": default_cfg("patch_embed.proj", 1000)
            for name in (
                *("small_patch16_36", "base_patch16_36x1"),
                *("small_patch16_18x2", "base_patch16_18x2"),
            )
        },
        **{
            f"dinov2_vit_{name}_patch16": default_cfg("patch_embed.proj", 0)
            for name in ("small", "base", "large", "huge")
        },
    }
)

DEIT = {"qkv_bias": True, "init_values": 1e-4}
NO_LAYER_SCALE = {"init_values": None}
DINOV2 = {
    "qkv_bias": True,
    "init_values": 1e-5,
    "class_position": True,
    "mask_token": True,
    "cls_token_std": 1e-6,
    "position_offset": 0.1,
    "drop_path_mode": "subset",
    "num_classes": 0,
}


def _deit(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build(VisionTransformer, name, pretrained, **{**DEIT, **kwargs})


def _parallel(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build(ParallelVisionTransformer, name, pretrained, **{**DEIT, **kwargs})


def _dinov2(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build(VisionTransformer, name, pretrained, **{**DINOV2, **kwargs})


@register_model
def deit_tiny_patch16_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT III ViT-Ti/16."""
    return _deit("deit_tiny_patch16_LS", pretrained, **{**size("tiny"), **kwargs})


@register_model
def deit_small_patch16_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT III ViT-S/16."""
    return _deit("deit_small_patch16_LS", pretrained, **{**size("small"), **kwargs})


@register_model
def deit_medium_patch16_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT III ViT-M/16."""
    return _deit("deit_medium_patch16_LS", pretrained, **{**size("medium"), **kwargs})


@register_model
def deit_base_patch16_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT III ViT-B/16."""
    return _deit("deit_base_patch16_LS", pretrained, **{**size("base"), **kwargs})


@register_model
def deit_large_patch16_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT III ViT-L/16."""
    return _deit("deit_large_patch16_LS", pretrained, **{**size("large"), **kwargs})


@register_model
def deit_huge_patch14_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT III ViT-H/14."""
    kwargs = {**size("huge"), "patch_size": 14, **kwargs}
    return _deit("deit_huge_patch14_LS", pretrained, **kwargs)


@register_model
def deit_huge_patch14_52_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT III ViT-H/14 of 52 blocks."""
    kwargs = {**size("huge_52"), "patch_size": 14, **kwargs}
    return _deit("deit_huge_patch14_52_LS", pretrained, **kwargs)


@register_model
def deit_small_patch16_36_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-S/16 of 36 blocks."""
    kwargs = {**size("small"), "depth": 36, **kwargs}
    return _deit("deit_small_patch16_36_LS", pretrained, **kwargs)


@register_model
def deit_small_patch16_36(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-S/16 of 36 blocks, without layer scale."""
    kwargs = {**size("small"), "depth": 36, **NO_LAYER_SCALE, **kwargs}
    return _deit("deit_small_patch16_36", pretrained, **kwargs)


@register_model
def deit_base_patch16_36x1_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-B/16 of 36 blocks."""
    kwargs = {**size("base"), "depth": 36, **kwargs}
    return _deit("deit_base_patch16_36x1_LS", pretrained, **kwargs)


@register_model
def deit_base_patch16_36x1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-B/16 of 36 blocks, without layer scale."""
    kwargs = {**size("base"), "depth": 36, **NO_LAYER_SCALE, **kwargs}
    return _deit("deit_base_patch16_36x1", pretrained, **kwargs)


@register_model
def deit_small_patch16_18x2_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-S/16 of 18 blocks with parallel branches."""
    kwargs = {**size("small"), "depth": 18, **kwargs}
    return _parallel("deit_small_patch16_18x2_LS", pretrained, **kwargs)


@register_model
def deit_small_patch16_18x2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-S/16 of 18 blocks with parallel branches, without layer scale."""
    kwargs = {**size("small"), "depth": 18, **NO_LAYER_SCALE, **kwargs}
    return _parallel("deit_small_patch16_18x2", pretrained, **kwargs)


@register_model
def deit_base_patch16_18x2_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-B/16 of 18 blocks with parallel branches."""
    kwargs = {**size("base"), "depth": 18, **kwargs}
    return _parallel("deit_base_patch16_18x2_LS", pretrained, **kwargs)


@register_model
def deit_base_patch16_18x2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-B/16 of 18 blocks with parallel branches, without layer scale."""
    kwargs = {**size("base"), "depth": 18, **NO_LAYER_SCALE, **kwargs}
    return _parallel("deit_base_patch16_18x2", pretrained, **kwargs)


@register_model
def deit_huge_patch14_26x2_LS(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-H/14 of 26 blocks with parallel branches."""
    kwargs = {**size("huge"), "patch_size": 14, "depth": 26, **kwargs}
    return _parallel("deit_huge_patch14_26x2_LS", pretrained, **kwargs)


@register_model
def dinov2_vit_small_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Plain DINOv2 ViT-S/16."""
    return _dinov2("dinov2_vit_small_patch16", pretrained, **{**size("small"), **kwargs})


@register_model
def dinov2_vit_base_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Plain DINOv2 ViT-B/16."""
    return _dinov2("dinov2_vit_base_patch16", pretrained, **{**size("base"), **kwargs})


@register_model
def dinov2_vit_large_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Plain DINOv2 ViT-L/16 (`vit_large`): 80.9 linear, 80.5 kNN on ImageNet as published."""
    return _dinov2("dinov2_vit_large_patch16", pretrained, **{**size("large"), **kwargs})


@register_model
def dinov2_vit_huge_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Plain DINOv2 ViT-H/16 (`vit_huge`): 81.7 linear, 81.0 kNN on ImageNet as published."""
    return _dinov2("dinov2_vit_huge_patch16", pretrained, **{**size("huge"), **kwargs})
