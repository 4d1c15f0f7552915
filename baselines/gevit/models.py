"""GE-ViTs under names of data set and group, registered with timm: `gevit_rotmnist_p4`, ...

`gevit_<data>_<group>`: the published settings. `modern_gevit_pcam_patch<p>`: patches first.
`gevit_pcam_gcnn_p4m`: an exact G-CNN first. Each function takes any keyword of `GEViT`, to override
its own; `group` among them.

The published PCam networks pool odd maps and are not equivariant. `gevit_pcam_p4` crops one more
pixel, so that it is equivariant (Departs from GE-ViT; same parameters). `gevit_pcam_p4_published`
is the original.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from baselines.gevit.network import GEViT
from baselines.gevit.weights import published_state
from vit.models import default_cfg

MNIST = {"mean": (0.1307,), "std": (0.3081,)}
CIFAR10 = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
PCAM = {"mean": (0.701, 0.538, 0.692), "std": (0.235, 0.277, 0.213)}
DIGITS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

ROTMNIST_GROUPS = ("z2", "p4", "p8", "p12", "p16", "mz2", "p4m", "p8m")
PATCHES = (2, 3, 6, 12, 16)


def _cfg(
    size: int, channels: int, num_classes: int, first_conv: str, colours: dict[str, Any]
) -> dict[str, Any]:
    shape = (channels, size, size)
    return {**default_cfg(first_conv, num_classes), "input_size": shape, **colours}


LIFTING = "lifting_self_attention.query"
default_cfgs = generate_default_cfgs(
    {
        **{f"gevit_rotmnist_{group}": _cfg(28, 1, 10, LIFTING, MNIST) for group in ROTMNIST_GROUPS},
        **{f"gevit_cifar10_{g}": _cfg(32, 3, 10, LIFTING, CIFAR10) for g in ("z2", "mz2")},
        **{
            f"gevit_pcam_{name}": _cfg(96, 3, 2, LIFTING, PCAM)
            for name in ("p4", "p8", "p4m", "p4_published", "p8_published")
        },
        **{
            f"modern_gevit_pcam_patch{patch}": _cfg(96, 3, 2, "stem.project", PCAM)
            for patch in PATCHES
        },
        "gevit_pcam_gcnn_p4m": _cfg(96, 3, 2, "stem.lift", PCAM),
        "gevit_digits_p4m": _cfg(32, 3, 10, "stem.lift", DIGITS),
    }
)

ROTMNIST = {
    "img_size": 28,
    "in_chans": 1,
    "num_classes": 10,
    "num_channels": 20,
    "num_heads": 9,
    "block_sizes": (2, 3),
    "crop": (2, 0, 2, 1, 1),
    "window": 5,
}
CIFAR = {
    "img_size": 32,
    "in_chans": 3,
    "num_classes": 10,
    "num_channels": 96,
    "num_heads": 9,
    "block_sizes": (2, 2, 2),
    "expansion": (1, 2, 1),
    "window": 5,
    "norm_between": True,
    "value_drop_rate": 0.0,
    "pool_drop_rate": 0.3,
    "input_drop_rate": 0.2,
}
PCAM_NET = {
    "img_size": 96,
    "in_chans": 3,
    "num_classes": 2,
    "num_channels": 12,
    "num_heads": 9,
    "block_sizes": (0, 1, 2, 1),
    "expansion": (1, 2, 2, 2),
    "crop": (0, 2, 2, 1),  # maps of 96 48 48 24 20 16 8 6 3
    "window": 5,
    "norm_between": True,
    "pool_last": True,
}
# Maps of 96 48 48 24 20 18 9 7 3: the last pool drops a row and a column.
PCAM_PUBLISHED = {**PCAM_NET, "crop": (0, 2, 1, 1), "group_table": "reference", "allow_odd": True}
BEHIND_A_STEM = {
    "img_size": 96,
    "in_chans": 3,
    "num_classes": 2,
    "num_channels": 20,
    "num_heads": 9,
    "block_sizes": (2, 3),
    "crop": (1, 0, 0, 0, 0),
    "norm_between": True,
}
MODERN = {**BEHIND_A_STEM, "group": "p4", "window": 3}
SMALL = {
    "group": "p4m",
    "img_size": 32,
    "in_chans": 3,
    "num_classes": 10,
    "num_channels": 24,
    "num_heads": 1,
    "block_sizes": (1, 1),
    "window": 3,
    "norm_between": True,
    "attn_drop_rate": 0.0,
    "value_drop_rate": 0.0,
    "stem": "gcnn",
    "stem_options": {"num_hidden": 1, "kernel_size": 5, "pool": 4, "keep_group": True},
}


def filter_state(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook on loaded weights: published spellings become ours."""
    return published_state(state, model)


def _build(name: str, pretrained: bool, settings: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    return build_model_with_cfg(
        GEViT,
        name,
        pretrained,
        pretrained_filter_fn=filter_state,
        feature_cfg={"out_indices": 2, "feature_cls": "getter"},
        **{**settings, **kwargs},
    )


def _rotmnist(group: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    settings = {**ROTMNIST, "group": group}
    return _build(f"gevit_rotmnist_{group}", pretrained, settings, kwargs)


def _pcam(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    group, _, published = name.partition("_")
    settings = {**(PCAM_PUBLISHED if published else PCAM_NET), "group": group}
    return _build(f"gevit_pcam_{name}", pretrained, settings, kwargs)


def _modern(patch: int, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    stem = {"patch_size": patch, "width": 128, "mirrors": True}
    settings = {**MODERN, "stem": "patch", "stem_options": stem}
    return _build(f"modern_gevit_pcam_patch{patch}", pretrained, settings, kwargs)


@register_model
def gevit_rotmnist_z2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Without symmetry, for comparison."""
    return _rotmnist("z2", pretrained, kwargs)


@register_model
def gevit_rotmnist_p4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Four rotations: 97.58 % on rotMNIST as published, the best epoch chosen on the test set."""
    return _rotmnist("p4", pretrained, kwargs)


@register_model
def gevit_rotmnist_p8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Eight rotations, of which the pixel grid has four."""
    return _rotmnist("p8", pretrained, kwargs)


@register_model
def gevit_rotmnist_p12(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Twelve rotations: 98.01 % on rotMNIST as published, the best of all."""
    return _rotmnist("p12", pretrained, kwargs)


@register_model
def gevit_rotmnist_p16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Sixteen rotations."""
    return _rotmnist("p16", pretrained, kwargs)


@register_model
def gevit_rotmnist_mz2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirroring alone."""
    return _rotmnist("mz2", pretrained, kwargs)


@register_model
def gevit_rotmnist_p4m(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The eight symmetries of the square, exact by our group table."""
    return _rotmnist("p4m", pretrained, kwargs)


@register_model
def gevit_rotmnist_p8m(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Eight rotations, each mirrored too."""
    return _rotmnist("p8m", pretrained, kwargs)


@register_model
def gevit_cifar10_z2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Without symmetry, for comparison."""
    return _build("gevit_cifar10_z2", pretrained, {**CIFAR, "group": "z2"}, kwargs)


@register_model
def gevit_cifar10_mz2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mirroring: 70.48 % on CIFAR-10 in the published logs, best epoch on the test set."""
    return _build("gevit_cifar10_mz2", pretrained, {**CIFAR, "group": "mz2"}, kwargs)


@register_model
def gevit_pcam_p4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Four rotations, with even pools."""
    return _pcam("p4", pretrained, kwargs)


@register_model
def gevit_pcam_p8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Eight rotations, with even pools."""
    return _pcam("p8", pretrained, kwargs)


@register_model
def gevit_pcam_p4m(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The eight symmetries of the square, with even pools."""
    return _pcam("p4m", pretrained, kwargs)


@register_model
def gevit_pcam_p4_published(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Not equivariant, for old checkpoints: its last pool drops a row and a column."""
    return _pcam("p4_published", pretrained, kwargs)


@register_model
def gevit_pcam_p8_published(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Not equivariant, for old checkpoints: 83.82 % on PCam as published, the best of all."""
    return _pcam("p8_published", pretrained, kwargs)


@register_model
def modern_gevit_pcam_patch2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Patches of 2 pixels first; 77.5 % with 1 % of PCam as published (validation)."""
    return _modern(2, pretrained, kwargs)


@register_model
def modern_gevit_pcam_patch3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Patches of 3 pixels first; 78.5 % with 1 % of PCam as published (validation)."""
    return _modern(3, pretrained, kwargs)


@register_model
def modern_gevit_pcam_patch6(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Patches of 6 pixels first; 78.8 % with 1 % of PCam as published (validation)."""
    return _modern(6, pretrained, kwargs)


@register_model
def modern_gevit_pcam_patch12(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Patches of 12 pixels first; 75.5 % with 1 % of PCam as published (validation)."""
    return _modern(12, pretrained, kwargs)


@register_model
def modern_gevit_pcam_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Patches of 16 pixels first; 73.9 % with 1 % of PCam as published (validation)."""
    return _modern(16, pretrained, kwargs)


@register_model
def gevit_pcam_gcnn_p4m(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """An exact G-CNN first: the published hybrid, but truly invariant to the eight symmetries."""
    settings = {**BEHIND_A_STEM, "group": "p4m", "window": 5, "pool_last": True, "stem": "gcnn"}
    return _build("gevit_pcam_gcnn_p4m", pretrained, settings, kwargs)


@register_model
def gevit_digits_p4m(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Small enough for the embedded digits on a CPU core: one group convolution, two blocks."""
    return _build("gevit_digits_p4m", pretrained, SMALL, kwargs)
