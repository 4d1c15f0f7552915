"""ResMLP and ConvNeXt under their published names, registered with timm.

`resmlp_equi_d2_*`, `d2_convnext_*`: mirror-equivariant. `resmlp*`, `convnext_isotropic_*`: the
plain twins. Each function takes any keyword of its class, to override its own.

Departs from Flopping for FLOPs: its plain hierarchical ConvNeXts are `flopping_convnext_*` here,
because `convnext_tiny` and so on are timm's; the published code overwrites them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from baselines.flopping.convnext import MirrorConvNeXt
from baselines.flopping.plain import PlainConvNeXt, PlainResMlp
from baselines.flopping.resmlp import MirrorResMlp
from vit.models import build, entrypoint

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


def _make(
    model_class: Callable[..., nn.Module], name: str, pretrained: bool, **kwargs: Any
) -> nn.Module:
    depths = kwargs.get("depths", (1,))
    stages = len(depths) if isinstance(depths, Sequence) else 1  # `build` refuses what is no list
    return build(model_class, name, pretrained, stages if stages > 1 else 3, **kwargs)


def _family(
    model_class: Callable[..., nn.Module], **cfg: Any
) -> Callable[..., Callable[..., nn.Module]]:
    return partial(entrypoint, __name__, partial(_make, model_class), cfg)


_mirror_resmlp = _family(MirrorResMlp, first_conv="stem.conv_A1", fixed_input_size=True)
_resmlp = _family(PlainResMlp, first_conv="stem.proj", fixed_input_size=True)
_mirror_convnext = _family(MirrorConvNeXt, first_conv="stem.conv_A1", crop_pct=0.875)
_convnext = _family(PlainConvNeXt, first_conv="stem", crop_pct=0.875)

resmlp_equi_d2_12 = _mirror_resmlp(
    "resmlp_equi_d2_12",
    "Mirror-equivariant ResMLP-S12: 72.0 top-1 on ImageNet, read off the paper's plot.",
    **RESMLP["12"],
)
resmlp_equi_d2_24 = _mirror_resmlp(
    "resmlp_equi_d2_24",
    "Mirror-equivariant ResMLP-S24: 74.9 top-1 on ImageNet, read off the paper's plot.",
    **RESMLP["24"],
)
resmlp_equi_d2_B_24 = _mirror_resmlp(
    "resmlp_equi_d2_B_24",
    "Mirror-equivariant ResMLP-B24: 80.8 top-1 on ImageNet, read off the paper's plot.",
    **RESMLP["B_24"],
)
resmlp_equi_d2_L_24 = _mirror_resmlp(
    "resmlp_equi_d2_L_24",
    "Mirror-equivariant ResMLP-L24: 81.5 top-1 on ImageNet, read off the paper's plot.",
    **RESMLP["L_24"],
)
resmlp_12 = _resmlp(
    "resmlp_12",
    "Plain ResMLP-S12: 76.6 top-1 on ImageNet, read off the paper's plot.",
    **RESMLP["12"],
)
resmlp_24 = _resmlp(
    "resmlp_24",
    "Plain ResMLP-S24: 79.4 top-1 on ImageNet, read off the paper's plot.",
    **RESMLP["24"],
)
resmlp_36 = _resmlp("resmlp_36", "Plain ResMLP-S36.", **RESMLP["36"])
resmlpB_24 = _resmlp(
    "resmlpB_24",
    "Plain ResMLP-B24: 81.0 top-1 on ImageNet, read off the paper's plot.",
    **RESMLP["B_24"],
)
resmlpL_24 = _resmlp(
    "resmlpL_24",
    "Plain ResMLP-L24: 80.4 top-1 on ImageNet, read off the paper's plot.",
    **RESMLP["L_24"],
)
d2_convnext_isotropic_small = _mirror_convnext(
    "d2_convnext_isotropic_small",
    "Mirror-equivariant isotropic ConvNeXt-S: 76.8 top-1, read off the paper's plot.",
    **ISOTROPIC["small"],
)
d2_convnext_isotropic_base = _mirror_convnext(
    "d2_convnext_isotropic_base",
    "Mirror-equivariant isotropic ConvNeXt-B: 81.3 top-1, read off the paper's plot.",
    **ISOTROPIC["base"],
)
d2_convnext_isotropic_large = _mirror_convnext(
    "d2_convnext_isotropic_large",
    "Mirror-equivariant isotropic ConvNeXt-L: 82.6 top-1, read off the paper's plot.",
    **ISOTROPIC["large"],
)
convnext_isotropic_small = _convnext(
    "convnext_isotropic_small",
    "Plain isotropic ConvNeXt-S: 79.7 top-1, read off the paper's plot.",
    **ISOTROPIC["small"],
)
convnext_isotropic_base = _convnext(
    "convnext_isotropic_base",
    "Plain isotropic ConvNeXt-B: 82.0 top-1, read off the paper's plot.",
    **ISOTROPIC["base"],
)
convnext_isotropic_large = _convnext(
    "convnext_isotropic_large",
    "Plain isotropic ConvNeXt-L: 82.6 top-1, read off the paper's plot.",
    **ISOTROPIC["large"],
)
d2_convnext_tiny = _mirror_convnext(
    "d2_convnext_tiny", "Mirror-equivariant ConvNeXt-T.", **HIERARCHICAL["tiny"]
)
d2_convnext_small = _mirror_convnext(
    "d2_convnext_small", "Mirror-equivariant ConvNeXt-S.", **HIERARCHICAL["small"]
)
d2_convnext_base = _mirror_convnext(
    "d2_convnext_base", "Mirror-equivariant ConvNeXt-B.", **HIERARCHICAL["base"]
)
d2_convnext_large = _mirror_convnext(
    "d2_convnext_large", "Mirror-equivariant ConvNeXt-L.", **HIERARCHICAL["large"]
)
d2_convnext_xlarge = _mirror_convnext(
    "d2_convnext_xlarge", "Mirror-equivariant ConvNeXt-XL.", **HIERARCHICAL["xlarge"]
)
flopping_convnext_tiny = _convnext(
    "flopping_convnext_tiny",
    "Plain ConvNeXt-T (`convnext_tiny` in the published code).",
    **HIERARCHICAL["tiny"],
)
flopping_convnext_small = _convnext(
    "flopping_convnext_small",
    "Plain ConvNeXt-S (`convnext_small` in the published code).",
    **HIERARCHICAL["small"],
)
flopping_convnext_base = _convnext(
    "flopping_convnext_base",
    "Plain ConvNeXt-B (`convnext_base` in the published code).",
    **HIERARCHICAL["base"],
)
flopping_convnext_large = _convnext(
    "flopping_convnext_large",
    "Plain ConvNeXt-L (`convnext_large` in the published code).",
    **HIERARCHICAL["large"],
)
flopping_convnext_xlarge = _convnext(
    "flopping_convnext_xlarge",
    "Plain ConvNeXt-XL (`convnext_xlarge` in the published code).",
    **HIERARCHICAL["xlarge"],
)
