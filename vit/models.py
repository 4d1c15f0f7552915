"""Plain ViTs under their published names, registered with timm.

`deit_*_LS`: DeiT III, the plain twins of the octic and the mirror nets; without `_LS`: without
layer scale; `_36`: deeper; `_18x2`, `_26x2`: of parallel branches (Touvron et al. 2022, "Three
things everyone should know about Vision Transformers"). `dinov2_vit_*_patch16`: the plain DINOv2
baselines of octic-vits. Each function takes any keyword of `VisionTransformer`, to override its
own.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from vit.backbone import channels_of, first_conv_of
from vit.finetune import adapt_state
from vit.keywords import check_keywords
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
}


def size(name: str, **changes: int) -> dict[str, int]:
    """Constructor keywords of a size; `changes` replace or join them."""
    embed_dim, depth, num_heads = SIZES[name]
    return {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, **changes}


def default_cfg(
    *,
    first_conv: str = "patch_embed.proj",
    img_size: int = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    **fields: Any,
) -> dict[str, Any]:
    """timm's description of a model: input, normalisation, first and last layer.

    fields: those of timm's `PretrainedCfg` that differ from ours.
    """
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": (in_chans, img_size, img_size),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": first_conv,
        "classifier": "head",
        "license": "apache-2.0",
        **fields,
    }


def filter_state(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook on loaded weights: published spellings become ours, adapted to this model.

    So timm's own call may ask for another number of classes, of image channels, or another image
    size than the file's. ValueError as `adapt_state`, and for a head that would start afresh, or
    channels that would be adapted, without having been asked.
    """
    adapted, changes = adapt_state(state, model)
    net: Any = model
    described, first = net.pretrained_cfg, first_conv_of(net)
    same_channels = channels_of(net) == described["input_size"][0]
    same_classes = net.num_classes == described["num_classes"]
    unasked = {"head": same_classes, "channels": same_channels}
    for part, words in changes:
        if unasked.get(part):
            raise ValueError(f"the weights do not fit: {words}")
    name = f"{first}.weight"
    if name in state and not same_channels:
        # timm's loader adapts this one itself, and warns of one that it finds adapted.
        adapted[name] = state[name]
    return adapted


def build(
    model_class: Callable[..., nn.Module],
    name: str,
    pretrained: bool,
    stages: int = 3,
    filter_fn: Callable[..., dict[str, Tensor]] = filter_state,
    /,
    **kwargs: Any,
) -> nn.Module:
    """Build a registered model the way timm builds its own.

    stages: how many maps timm's `features_only` gives if not told. filter_fn: its hook on weights.
    ValueError for a keyword whose value the class cannot mean.
    """
    check_keywords(model_class, kwargs)
    return build_model_with_cfg(
        model_class,
        name,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"out_indices": stages, "feature_cls": "getter"},
        **kwargs,
    )


def entrypoint(
    module: str,
    make: Callable[..., nn.Module],
    cfg: dict[str, Any],
    name: str,
    description: str,
    /,
    **presets: Any,
) -> Callable[..., nn.Module]:
    """The function that builds the model `name`, registered with timm as one of `module`.

    Assign it to that name in the module, so that it can be imported and pickled.

    make: builds the model, called as `make(name, pretrained, **keywords)`.
    cfg: keywords of `default_cfg`; image size, channels and classes are those of the presets. The
        result joins the module's `default_cfgs`, where timm looks for it.
    description: the function's docstring, in one line.
    presets: the model's keywords, which a call may override.
    """

    def model(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return make(name, pretrained, **{**presets, **kwargs})

    model.__module__, model.__name__, model.__qualname__ = module, name, name
    model.__doc__ = description
    known = {key: presets[key] for key in ("img_size", "in_chans", "num_classes") if key in presets}
    default_cfgs = vars(sys.modules[module]).setdefault("default_cfgs", {})
    default_cfgs.update(generate_default_cfgs({name: default_cfg(**cfg, **known)}))
    return register_model(model)


DEIT = {"qkv_bias": True, "init_values": 1e-4}
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

_deit = partial(entrypoint, __name__, partial(build, VisionTransformer), {}, **DEIT)
_parallel = partial(entrypoint, __name__, partial(build, ParallelVisionTransformer), {}, **DEIT)
_dinov2 = partial(entrypoint, __name__, partial(build, VisionTransformer), {}, **DINOV2)

deit_tiny_patch16_LS = _deit("deit_tiny_patch16_LS", "DeiT III ViT-Ti/16.", **size("tiny"))
deit_small_patch16_LS = _deit("deit_small_patch16_LS", "DeiT III ViT-S/16.", **size("small"))
deit_medium_patch16_LS = _deit("deit_medium_patch16_LS", "DeiT III ViT-M/16.", **size("medium"))
deit_base_patch16_LS = _deit("deit_base_patch16_LS", "DeiT III ViT-B/16.", **size("base"))
deit_large_patch16_LS = _deit("deit_large_patch16_LS", "DeiT III ViT-L/16.", **size("large"))
deit_huge_patch14_LS = _deit(
    "deit_huge_patch14_LS", "DeiT III ViT-H/14.", **size("huge", patch_size=14)
)
deit_huge_patch14_52_LS = _deit(
    "deit_huge_patch14_52_LS",
    "DeiT III ViT-H/14 of 52 blocks.",
    **size("huge", depth=52, patch_size=14),
)
deit_small_patch16_36_LS = _deit(
    "deit_small_patch16_36_LS", "ViT-S/16 of 36 blocks.", **size("small", depth=36)
)
deit_small_patch16_36 = _deit(
    "deit_small_patch16_36",
    "ViT-S/16 of 36 blocks, without layer scale.",
    **size("small", depth=36),
    init_values=None,
)
deit_base_patch16_36x1_LS = _deit(
    "deit_base_patch16_36x1_LS", "ViT-B/16 of 36 blocks.", **size("base", depth=36)
)
deit_base_patch16_36x1 = _deit(
    "deit_base_patch16_36x1",
    "ViT-B/16 of 36 blocks, without layer scale.",
    **size("base", depth=36),
    init_values=None,
)
deit_small_patch16_18x2_LS = _parallel(
    "deit_small_patch16_18x2_LS",
    "ViT-S/16 of 18 blocks with parallel branches.",
    **size("small", depth=18),
)
deit_small_patch16_18x2 = _parallel(
    "deit_small_patch16_18x2",
    "ViT-S/16 of 18 blocks with parallel branches, without layer scale.",
    **size("small", depth=18),
    init_values=None,
)
deit_base_patch16_18x2_LS = _parallel(
    "deit_base_patch16_18x2_LS",
    "ViT-B/16 of 18 blocks with parallel branches.",
    **size("base", depth=18),
)
deit_base_patch16_18x2 = _parallel(
    "deit_base_patch16_18x2",
    "ViT-B/16 of 18 blocks with parallel branches, without layer scale.",
    **size("base", depth=18),
    init_values=None,
)
deit_huge_patch14_26x2_LS = _parallel(
    "deit_huge_patch14_26x2_LS",
    "ViT-H/14 of 26 blocks with parallel branches.",
    **size("huge", depth=26, patch_size=14),
)
dinov2_vit_small_patch16 = _dinov2(
    "dinov2_vit_small_patch16", "Plain DINOv2 ViT-S/16.", **size("small")
)
dinov2_vit_base_patch16 = _dinov2(
    "dinov2_vit_base_patch16", "Plain DINOv2 ViT-B/16.", **size("base")
)
dinov2_vit_large_patch16 = _dinov2(
    "dinov2_vit_large_patch16",
    "Plain DINOv2 ViT-L/16 (`vit_large`): 80.9 linear, 80.5 kNN on ImageNet as published.",
    **size("large"),
)
dinov2_vit_huge_patch16 = _dinov2(
    "dinov2_vit_huge_patch16",
    "Plain DINOv2 ViT-H/16 (`vit_huge`): 81.7 linear, 81.0 kNN on ImageNet as published.",
    **size("huge"),
)
