"""ResMLP and ConvNeXt under their published names, registered with timm.

`resmlp_equi_d2_*`, `d2_convnext_*`: mirror-equivariant. `resmlp*`, `convnext_isotropic_*`: the
plain twins. Each function takes any keyword of its class, to override its own.

Departs from Flopping for FLOPs: its plain hierarchical ConvNeXts are `flopping_convnext_*` here,
because `convnext_tiny` and so on are timm's; the published code overwrites them.
"""

from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from baselines.flopping.convnext import MirrorConvNeXt
from baselines.flopping.plain import PlainConvNeXt, PlainResMlp
from baselines.flopping.resmlp import MirrorResMlp
from vit.models import default_cfg, filter_state

# size -> constructor keywords
RESMLP: dict[str, dict[str, Any]] = {
    "12": {"embed_dim": 384, "depth": 12, "init_values": 0.1},
    "24": {"embed_dim": 384, "depth": 24, "init_values": 1e-5},
    "36": {"embed_dim": 384, "depth": 36, "init_values": 1e-6},
    "B_24": {"embed_dim": 768, "depth": 24, "init_values": 1e-6},
    "L_24": {"embed_dim": 1280, "depth": 24, "init_values": 1e-6},
}
ISOTROPIC: dict[str, dict[str, Any]] = {
    name: {"depths": (depth,), "dims": (dim,), "patch_size": 16, "init_values": None}
    for name, depth, dim in (("small", 18, 384), ("base", 18, 768), ("large", 36, 1024))
}
HIERARCHICAL: dict[str, dict[str, Any]] = {
    name: {"depths": (3, 3, middle, 3), "dims": (dim, 2 * dim, 4 * dim, 8 * dim)}
    for name, middle, dim in (
        *(("tiny", 9, 96), ("small", 27, 96), ("base", 27, 128)),
        *(("large", 27, 192), ("xlarge", 27, 256)),
    )
}


def _cfg(first_conv: str, crop_pct: float) -> dict[str, Any]:
    return {**default_cfg(first_conv, 1000), "crop_pct": crop_pct}


def _resmlp_cfg(first_conv: str) -> dict[str, Any]:
    return {**_cfg(first_conv, 1.0), "fixed_input_size": True}


default_cfgs = generate_default_cfgs(
    {
        **{
            f"resmlp_equi_d2_{name}": _resmlp_cfg("stem.conv_A1") for name in RESMLP if name != "36"
        },
        **{f"resmlp_{name}": _resmlp_cfg("stem.proj") for name in ("12", "24", "36")},
        **{f"resmlp{name}": _resmlp_cfg("stem.proj") for name in ("B_24", "L_24")},
        **{f"d2_convnext_isotropic_{name}": _cfg("stem.conv_A1", 0.875) for name in ISOTROPIC},
        **{f"convnext_isotropic_{name}": _cfg("stem", 0.875) for name in ISOTROPIC},
        **{f"d2_convnext_{name}": _cfg("stem.conv_A1", 0.875) for name in HIERARCHICAL},
        **{f"flopping_convnext_{name}": _cfg("stem", 0.875) for name in HIERARCHICAL},
    }
)


def _make(
    model_class: Callable[..., nn.Module],
    name: str,
    pretrained: bool,
    size: dict[str, Any],
    kwargs: dict[str, Any],
) -> nn.Module:
    sizes = {**size, **kwargs}
    stages = len(sizes.get("depths", (1,)))
    return build_model_with_cfg(
        model_class,
        name,
        pretrained,
        pretrained_filter_fn=filter_state,
        feature_cfg={"out_indices": stages if stages > 1 else 3, "feature_cls": "getter"},
        **sizes,
    )


@register_model
def resmlp_equi_d2_12(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-equivariant ResMLP-S12: 72.0 top-1 on ImageNet, read off the paper's plot."""
    return _make(MirrorResMlp, "resmlp_equi_d2_12", pretrained, RESMLP["12"], kwargs)


@register_model
def resmlp_equi_d2_24(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-equivariant ResMLP-S24: 74.9 top-1 on ImageNet, read off the paper's plot."""
    return _make(MirrorResMlp, "resmlp_equi_d2_24", pretrained, RESMLP["24"], kwargs)


@register_model
def resmlp_equi_d2_B_24(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-equivariant ResMLP-B24: 80.8 top-1 on ImageNet, read off the paper's plot."""
    return _make(MirrorResMlp, "resmlp_equi_d2_B_24", pretrained, RESMLP["B_24"], kwargs)


@register_model
def resmlp_equi_d2_L_24(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-equivariant ResMLP-L24: 81.5 top-1 on ImageNet, read off the paper's plot."""
    return _make(MirrorResMlp, "resmlp_equi_d2_L_24", pretrained, RESMLP["L_24"], kwargs)


@register_model
def resmlp_12(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Plain ResMLP-S12: 76.6 top-1 on ImageNet, read off the paper's plot."""
    return _make(PlainResMlp, "resmlp_12", pretrained, RESMLP["12"], kwargs)


@register_model
def resmlp_24(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Plain ResMLP-S24: 79.4 top-1 on ImageNet, read off the paper's plot."""
    return _make(PlainResMlp, "resmlp_24", pretrained, RESMLP["24"], kwargs)


@register_model
def resmlp_36(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Plain ResMLP-S36."""
    return _make(PlainResMlp, "resmlp_36", pretrained, RESMLP["36"], kwargs)


@register_model
def resmlpB_24(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Plain ResMLP-B24: 81.0 top-1 on ImageNet, read off the paper's plot."""
    return _make(PlainResMlp, "resmlpB_24", pretrained, RESMLP["B_24"], kwargs)


@register_model
def resmlpL_24(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Plain ResMLP-L24: 80.4 top-1 on ImageNet, read off the paper's plot."""
    return _make(PlainResMlp, "resmlpL_24", pretrained, RESMLP["L_24"], kwargs)


@register_model
def d2_convnext_isotropic_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-equivariant isotropic ConvNeXt-S: 76.8 top-1, read off the paper's plot."""
    return _make(
        MirrorConvNeXt, "d2_convnext_isotropic_small", pretrained, ISOTROPIC["small"], kwargs
    )


@register_model
def d2_convnext_isotropic_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-equivariant isotropic ConvNeXt-B: 81.3 top-1, read off the paper's plot."""
    return _make(
        MirrorConvNeXt, "d2_convnext_isotropic_base", pretrained, ISOTROPIC["base"], kwargs
    )


@register_model
def d2_convnext_isotropic_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-equivariant isotropic ConvNeXt-L: 82.6 top-1, read off the paper's plot."""
    return _make(
        MirrorConvNeXt, "d2_convnext_isotropic_large", pretrained, ISOTROPIC["large"], kwargs
    )


@register_model
def convnext_isotropic_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Plain isotropic ConvNeXt-S: 79.7 top-1, read off the paper's plot."""
    return _make(PlainConvNeXt, "convnext_isotropic_small", pretrained, ISOTROPIC["small"], kwargs)


@register_model
def convnext_isotropic_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Plain isotropic ConvNeXt-B: 82.0 top-1, read off the paper's plot."""
    return _make(PlainConvNeXt, "convnext_isotropic_base", pretrained, ISOTROPIC["base"], kwargs)


@register_model
def convnext_isotropic_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Plain isotropic ConvNeXt-L: 82.6 top-1, read off the paper's plot."""
    return _make(PlainConvNeXt, "convnext_isotropic_large", pretrained, ISOTROPIC["large"], kwargs)


@register_model
def d2_convnext_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-equivariant ConvNeXt-T."""
    return _make(MirrorConvNeXt, "d2_convnext_tiny", pretrained, HIERARCHICAL["tiny"], kwargs)


@register_model
def d2_convnext_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-equivariant ConvNeXt-S."""
    return _make(MirrorConvNeXt, "d2_convnext_small", pretrained, HIERARCHICAL["small"], kwargs)


@register_model
def d2_convnext_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-equivariant ConvNeXt-B."""
    return _make(MirrorConvNeXt, "d2_convnext_base", pretrained, HIERARCHICAL["base"], kwargs)


@register_model
def d2_convnext_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-equivariant ConvNeXt-L."""
    return _make(MirrorConvNeXt, "d2_convnext_large", pretrained, HIERARCHICAL["large"], kwargs)


@register_model
def d2_convnext_xlarge(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirror-equivariant ConvNeXt-XL."""
    return _make(MirrorConvNeXt, "d2_convnext_xlarge", pretrained, HIERARCHICAL["xlarge"], kwargs)


@register_model
def flopping_convnext_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Plain ConvNeXt-T (`convnext_tiny` in the published code)."""
    return _make(PlainConvNeXt, "flopping_convnext_tiny", pretrained, HIERARCHICAL["tiny"], kwargs)


@register_model
def flopping_convnext_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Plain ConvNeXt-S (`convnext_small` in the published code)."""
    return _make(
        PlainConvNeXt, "flopping_convnext_small", pretrained, HIERARCHICAL["small"], kwargs
    )


@register_model
def flopping_convnext_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Plain ConvNeXt-B (`convnext_base` in the published code)."""
    return _make(PlainConvNeXt, "flopping_convnext_base", pretrained, HIERARCHICAL["base"], kwargs)


@register_model
def flopping_convnext_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Plain ConvNeXt-L (`convnext_large` in the published code)."""
    return _make(
        PlainConvNeXt, "flopping_convnext_large", pretrained, HIERARCHICAL["large"], kwargs
    )


@register_model
def flopping_convnext_xlarge(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Plain ConvNeXt-XL (`convnext_xlarge` in the published code)."""
    return _make(
        PlainConvNeXt, "flopping_convnext_xlarge", pretrained, HIERARCHICAL["xlarge"], kwargs
    )
