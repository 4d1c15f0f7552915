"""DHVTs under their published names, registered with timm.

Each function takes any keyword of `DHVT` to override its own. `apply_dhvt=False` gives the plain
ViT of the same size instead, with patches by one projection and learned positions, as the baseline
to compare with. The `deit_*` names of DHVT's code stay timm's models here; in DHVT's code they
are DHVTs.

Number of heads as published: 4 in both tiny models of CIFAR and DomainNet, 3 in that of ImageNet.
With `num_heads=3` a DomainNet model accepts the weights of the latter.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from baselines.dhvt.network import DHVT
from vit.models import build, default_cfg
from vit.vision_transformer import VisionTransformer

TINY = {"embed_dim": 192, "depth": 12}
SMALL = {"embed_dim": 384, "depth": 12}
CIFAR4 = {"img_size": 32, "patch_size": 4, "num_classes": 100}
CIFAR2 = {"img_size": 32, "patch_size": 2, "num_classes": 100}
DOMAIN = {"img_size": 224, "patch_size": 16, "num_classes": 345}
IMAGENET = {"img_size": 224, "patch_size": 16, "num_classes": 1000}
MODELS: dict[str, dict[str, Any]] = {
    "dhvt_tiny_cifar_patch4": {**TINY, **CIFAR4, "num_heads": 4},
    "dhvt_small_cifar_patch4": {**SMALL, **CIFAR4, "num_heads": 8},
    "dhvt_tiny_cifar_patch2": {**TINY, **CIFAR2, "num_heads": 4},
    "dhvt_small_cifar_patch2": {**SMALL, **CIFAR2, "num_heads": 8},
    "dhvt_tiny_domain_patch16": {**TINY, **DOMAIN, "num_heads": 4},
    "dhvt_small_domain_patch16": {**SMALL, **DOMAIN, "num_heads": 6},
    "dhvt_tiny_imagenet_patch16": {**TINY, **IMAGENET, "num_heads": 3},
    "dhvt_small_imagenet_patch16": {**SMALL, **IMAGENET, "num_heads": 6},
}
OF_DHVT_ALONE = ("decay", "sync_batch_norm", "representation_size", "distilled")


def _cfg(settings: dict[str, Any]) -> dict[str, Any]:
    pixels, classes = settings["img_size"], settings["num_classes"]
    crop_pct = 1.0 if pixels <= 32 else 0.875
    return default_cfg(
        first_conv="patch_embed.proj.0.0", img_size=pixels, num_classes=classes, crop_pct=crop_pct
    )


default_cfgs = generate_default_cfgs({name: _cfg(entry) for name, entry in MODELS.items()})


def _make(
    name: str, pretrained: bool, kwargs: dict[str, Any], apply_dhvt: bool = True
) -> nn.Module:
    settings = {**MODELS[name], **kwargs}
    if apply_dhvt:
        return build(DHVT, name, pretrained, **settings)
    unfit = [key for key in OF_DHVT_ALONE if settings.get(key)]
    if unfit:
        raise ValueError(
            f"{', '.join(unfit)}: the plain ViT of apply_dhvt=False has no such option"
        )
    settings = {key: value for key, value in settings.items() if key not in OF_DHVT_ALONE}
    overlay = {
        "first_conv": "patch_embed.proj",
        **(settings.pop("pretrained_cfg_overlay", None) or {}),
    }
    plain = {"class_position": True, "drop_path_uniform": False, **settings}
    return build(VisionTransformer, name, pretrained, pretrained_cfg_overlay=overlay, **plain)


@register_model
def dhvt_tiny_cifar_patch4(
    pretrained: bool = False, apply_dhvt: bool = True, **kwargs: Any
) -> nn.Module:
    """DHVT-T for CIFAR-100, patches of 4: 6.0 M parameters, 0.39 G multiply-adds."""
    return _make("dhvt_tiny_cifar_patch4", pretrained, kwargs, apply_dhvt)


@register_model
def dhvt_small_cifar_patch4(
    pretrained: bool = False, apply_dhvt: bool = True, **kwargs: Any
) -> nn.Module:
    """DHVT-S for CIFAR-100, patches of 4: 23.4 M parameters, 1.5 G multiply-adds."""
    return _make("dhvt_small_cifar_patch4", pretrained, kwargs, apply_dhvt)


@register_model
def dhvt_tiny_cifar_patch2(
    pretrained: bool = False, apply_dhvt: bool = True, **kwargs: Any
) -> nn.Module:
    """DHVT-T for CIFAR-100, patches of 2: 5.8 M parameters, 1.7 G multiply-adds."""
    return _make("dhvt_tiny_cifar_patch2", pretrained, kwargs, apply_dhvt)


@register_model
def dhvt_small_cifar_patch2(
    pretrained: bool = False, apply_dhvt: bool = True, **kwargs: Any
) -> nn.Module:
    """DHVT-S for CIFAR-100, patches of 2: 22.8 M parameters, 6.2 G multiply-adds."""
    return _make("dhvt_small_cifar_patch2", pretrained, kwargs, apply_dhvt)


@register_model
def dhvt_tiny_domain_patch16(
    pretrained: bool = False, apply_dhvt: bool = True, **kwargs: Any
) -> nn.Module:
    """DHVT-T for a domain of DomainNet (345 classes): 6.1 M parameters."""
    return _make("dhvt_tiny_domain_patch16", pretrained, kwargs, apply_dhvt)


@register_model
def dhvt_small_domain_patch16(
    pretrained: bool = False, apply_dhvt: bool = True, **kwargs: Any
) -> nn.Module:
    """DHVT-S for a domain of DomainNet (345 classes): 23.8 M parameters."""
    return _make("dhvt_small_domain_patch16", pretrained, kwargs, apply_dhvt)


@register_model
def dhvt_tiny_imagenet_patch16(
    pretrained: bool = False, apply_dhvt: bool = True, **kwargs: Any
) -> nn.Module:
    """DHVT-T for ImageNet: 77.6 top-1 as published, 1.4 G multiply-adds."""
    return _make("dhvt_tiny_imagenet_patch16", pretrained, kwargs, apply_dhvt)


@register_model
def dhvt_small_imagenet_patch16(
    pretrained: bool = False, apply_dhvt: bool = True, **kwargs: Any
) -> nn.Module:
    """DHVT-S for ImageNet: 82.3 top-1 as published, 5.1 G multiply-adds."""
    return _make("dhvt_small_imagenet_patch16", pretrained, kwargs, apply_dhvt)
