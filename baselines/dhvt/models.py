"""DHVTs under their published names, registered with timm.

Each function takes any keyword of `DHVT` to override its own. `apply_dhvt=False` gives the plain
ViT of the same size instead, with patches by one projection and learned positions, as the baseline
to compare with. The `deit_*` names of DHVT's code stay timm's models here; in DHVT's code they
are DHVTs.

Number of heads as published: 4 in both tiny models of CIFAR and DomainNet, 3 in that of ImageNet.
With `num_heads=3` a DomainNet model accepts the weights of the latter.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from baselines.dhvt.network import DHVT
from utils.ranges import check_flags
from vit.models import build, entrypoint
from vit.vision_transformer import VisionTransformer

TINY = {"embed_dim": 192, "depth": 12}
SMALL = {"embed_dim": 384, "depth": 12}
CIFAR4 = {"img_size": 32, "patch_size": 4, "num_classes": 100}
CIFAR2 = {"img_size": 32, "patch_size": 2, "num_classes": 100}
DOMAIN = {"img_size": 224, "patch_size": 16, "num_classes": 345}
IMAGENET = {"img_size": 224, "patch_size": 16, "num_classes": 1000}
OF_DHVT_ALONE = ("decay", "sync_batch_norm", "representation_size", "distilled")


def _make(name: str, pretrained: bool, *, apply_dhvt: bool = True, **kwargs: Any) -> nn.Module:
    check_flags(apply_dhvt=apply_dhvt)
    if apply_dhvt:
        return build(DHVT, name, pretrained, **kwargs)
    unfit = [key for key in OF_DHVT_ALONE if kwargs.get(key)]
    if unfit:
        raise ValueError(
            f"{', '.join(unfit)}: the plain ViT of apply_dhvt=False has no such option"
        )
    settings = {key: value for key, value in kwargs.items() if key not in OF_DHVT_ALONE}
    overlay = {
        "first_conv": "patch_embed.proj",
        **(settings.pop("pretrained_cfg_overlay", None) or {}),
    }
    plain = {"class_position": True, "drop_path_uniform": False, **settings}
    return build(VisionTransformer, name, pretrained, pretrained_cfg_overlay=overlay, **plain)


def _family(crop_pct: float, **data: int) -> Callable[..., Callable[..., nn.Module]]:
    cfg = {"first_conv": "patch_embed.proj.0.0", "crop_pct": crop_pct}
    return partial(entrypoint, __name__, _make, cfg, **data)


_cifar4 = _family(1.0, **CIFAR4)
_cifar2 = _family(1.0, **CIFAR2)
_domain = _family(0.875, **DOMAIN)
_imagenet = _family(0.875, **IMAGENET)

dhvt_tiny_cifar_patch4 = _cifar4(
    "dhvt_tiny_cifar_patch4",
    "DHVT-T for CIFAR-100, patches of 4: 6.0 M parameters, 0.39 G multiply-adds.",
    **TINY,
    num_heads=4,
)
dhvt_small_cifar_patch4 = _cifar4(
    "dhvt_small_cifar_patch4",
    "DHVT-S for CIFAR-100, patches of 4: 23.4 M parameters, 1.5 G multiply-adds.",
    **SMALL,
    num_heads=8,
)
dhvt_tiny_cifar_patch2 = _cifar2(
    "dhvt_tiny_cifar_patch2",
    "DHVT-T for CIFAR-100, patches of 2: 5.8 M parameters, 1.7 G multiply-adds.",
    **TINY,
    num_heads=4,
)
dhvt_small_cifar_patch2 = _cifar2(
    "dhvt_small_cifar_patch2",
    "DHVT-S for CIFAR-100, patches of 2: 22.8 M parameters, 6.2 G multiply-adds.",
    **SMALL,
    num_heads=8,
)
dhvt_tiny_domain_patch16 = _domain(
    "dhvt_tiny_domain_patch16",
    "DHVT-T for a domain of DomainNet (345 classes): 6.1 M parameters.",
    **TINY,
    num_heads=4,
)
dhvt_small_domain_patch16 = _domain(
    "dhvt_small_domain_patch16",
    "DHVT-S for a domain of DomainNet (345 classes): 23.8 M parameters.",
    **SMALL,
    num_heads=6,
)
dhvt_tiny_imagenet_patch16 = _imagenet(
    "dhvt_tiny_imagenet_patch16",
    "DHVT-T for ImageNet: 77.6 top-1 as published, 1.4 G multiply-adds.",
    **TINY,
    num_heads=3,
)
dhvt_small_imagenet_patch16 = _imagenet(
    "dhvt_small_imagenet_patch16",
    "DHVT-S for ImageNet: 82.3 top-1 as published, 5.1 G multiply-adds.",
    **SMALL,
    num_heads=6,
)
