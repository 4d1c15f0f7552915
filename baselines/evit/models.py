"""EViTs under their published names, registered with timm.

Each function takes any keyword of `EViT` to override its own, `base_keep_rate`, `drop_loc` and
`fuse_token` among them. EViT's `deit_{tiny,small,base}_patch16_224` and `deit_base_patch16_384` are
timm's models of these names, the same networks with the same names of weights; they are not
registered again.

Departs from EViT: every model accepts base_keep_rate and drop_loc; in EViT's code most fail.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from baselines.evit.network import EViT
from vit.models import build, default_cfg, size

# name -> size, pixels a side, keep rate of blocks 3, 6 and 9
MODELS: dict[str, tuple[str, int, float]] = {
    "deit_small_patch16_shrink_base": ("small", 224, 0.7),
    "deit_base_patch16_shrink_base": ("base", 224, 0.7),
    "deit_small_patch16_224_shrink_base": ("small", 224, 0.7),
    "deit_small_patch16_224_shrink": ("small", 224, 0.7),
    "deit_small_patch16_272_shrink": ("small", 272, 0.7),
    "deit_small_patch16_224_shrink05": ("small", 224, 0.5),
    "deit_small_patch16_304_shrink05": ("small", 304, 0.5),
    "deit_small_patch16_288_shrink06": ("small", 288, 0.6),
}


def _cfg(pixels: int) -> dict[str, Any]:
    cfg = default_cfg("patch_embed.proj", 1000)
    return {**cfg, "input_size": (3, pixels, pixels), "crop_pct": 0.875}


default_cfgs = generate_default_cfgs({name: _cfg(entry[1]) for name, entry in MODELS.items()})


def _make(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    width, pixels, rate = MODELS[name]
    preset: dict[str, Any] = {"patch_size": 16, "img_size": pixels, **size(width)}
    if kwargs.get("keep_rate") is None:
        preset["base_keep_rate"] = rate
    return build(EViT, name, pretrained, **{**preset, **kwargs})


@register_model
def deit_small_patch16_shrink_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EViT-DeiT-S: fused, 79.5 top-1 at a keep rate of 0.7, 3.0 G multiply-adds."""
    return _make("deit_small_patch16_shrink_base", pretrained, kwargs)


@register_model
def deit_base_patch16_shrink_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EViT-DeiT-B: 11.6 G multiply-adds, fused, at a keep rate of 0.7."""
    return _make("deit_base_patch16_shrink_base", pretrained, kwargs)


@register_model
def deit_small_patch16_224_shrink_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EViT-DeiT-S, under the name with its resolution."""
    return _make("deit_small_patch16_224_shrink_base", pretrained, kwargs)


@register_model
def deit_small_patch16_224_shrink(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EViT-DeiT-S at a keep rate of 0.7."""
    return _make("deit_small_patch16_224_shrink", pretrained, kwargs)


@register_model
def deit_small_patch16_272_shrink(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EViT-DeiT-S at 272 x 272 pixels and a keep rate of 0.7: 4.6 G, as much as DeiT-S at 224."""
    return _make("deit_small_patch16_272_shrink", pretrained, kwargs)


@register_model
def deit_small_patch16_224_shrink05(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EViT-DeiT-S at a keep rate of 0.5."""
    return _make("deit_small_patch16_224_shrink05", pretrained, kwargs)


@register_model
def deit_small_patch16_304_shrink05(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EViT-DeiT-S at 304 x 304 pixels and a keep rate of 0.5: 81.0 top-1, read off a plot."""
    return _make("deit_small_patch16_304_shrink05", pretrained, kwargs)


@register_model
def deit_small_patch16_288_shrink06(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EViT-DeiT-S at 288 x 288 pixels and a keep rate of 0.6: 4.5 G multiply-adds."""
    return _make("deit_small_patch16_288_shrink06", pretrained, kwargs)
