"""GE-ViTs under names of data set and group, registered with timm: `gevit_rotmnist_p4`, ...

`gevit_<data>_<group>`: the published settings. `modern_gevit_pcam_patch<p>`: patches first.
`gevit_pcam_gcnn_p4m`: an exact G-CNN first. Each function takes any keyword of `GEViT`, to override
its own; `group` among them.

The published PCam networks pool odd maps and are not equivariant. `gevit_pcam_p4` crops one more
pixel, so that it is equivariant (Departs from GE-ViT; same parameters). `gevit_pcam_p4_published`
is the original.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from baselines.gevit.network import GEViT
from baselines.gevit.weights import published_state
from vit.models import build, entrypoint

MNIST = {"mean": (0.1307,), "std": (0.3081,)}
CIFAR10 = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
PCAM = {"mean": (0.701, 0.538, 0.692), "std": (0.235, 0.277, 0.213)}
DIGITS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

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
MODERN = {**BEHIND_A_STEM, "group": "p4", "window": 3, "stem": "patch"}
EXACT = {**BEHIND_A_STEM, "group": "p4m", "window": 5, "pool_last": True, "stem": "gcnn"}
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


def _make(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build(GEViT, name, pretrained, 2, published_state, **kwargs)


def _family(
    first_conv: str, colours: dict[str, Any], presets: dict[str, Any]
) -> Callable[..., Callable[..., nn.Module]]:
    return partial(entrypoint, __name__, _make, {"first_conv": first_conv, **colours}, **presets)


def _patches(size: int) -> dict[str, Any]:
    return {"patch_size": size, "width": 128, "mirrors": True}


LIFTING = "lifting_self_attention.query"
_rotmnist = _family(LIFTING, MNIST, ROTMNIST)
_cifar10 = _family(LIFTING, CIFAR10, CIFAR)
_pcam = _family(LIFTING, PCAM, PCAM_NET)
_pcam_published = _family(LIFTING, PCAM, PCAM_PUBLISHED)
_modern = _family("stem.project", PCAM, MODERN)
_exact = _family("stem.lift", PCAM, EXACT)
_digits = _family("stem.lift", DIGITS, SMALL)

gevit_rotmnist_z2 = _rotmnist("gevit_rotmnist_z2", "Without symmetry, for comparison.", group="z2")
gevit_rotmnist_p4 = _rotmnist(
    "gevit_rotmnist_p4",
    "Four rotations: 97.58 % on rotMNIST as published, the best epoch chosen on the test set.",
    group="p4",
)
gevit_rotmnist_p8 = _rotmnist(
    "gevit_rotmnist_p8", "Eight rotations, of which the pixel grid has four.", group="p8"
)
gevit_rotmnist_p12 = _rotmnist(
    "gevit_rotmnist_p12",
    "Twelve rotations: 98.01 % on rotMNIST as published, the best of all.",
    group="p12",
)
gevit_rotmnist_p16 = _rotmnist("gevit_rotmnist_p16", "Sixteen rotations.", group="p16")
gevit_rotmnist_mz2 = _rotmnist("gevit_rotmnist_mz2", "Mirroring alone.", group="mz2")
gevit_rotmnist_p4m = _rotmnist(
    "gevit_rotmnist_p4m",
    "The eight symmetries of the square, exact by our group table.",
    group="p4m",
)
gevit_rotmnist_p8m = _rotmnist(
    "gevit_rotmnist_p8m", "Eight rotations, each mirrored too.", group="p8m"
)
gevit_cifar10_z2 = _cifar10("gevit_cifar10_z2", "Without symmetry, for comparison.", group="z2")
gevit_cifar10_mz2 = _cifar10(
    "gevit_cifar10_mz2",
    "Mirroring: 70.48 % on CIFAR-10 in the published logs, best epoch on the test set.",
    group="mz2",
)
gevit_pcam_p4 = _pcam("gevit_pcam_p4", "Four rotations, with even pools.", group="p4")
gevit_pcam_p8 = _pcam("gevit_pcam_p8", "Eight rotations, with even pools.", group="p8")
gevit_pcam_p4m = _pcam(
    "gevit_pcam_p4m", "The eight symmetries of the square, with even pools.", group="p4m"
)
gevit_pcam_p4_published = _pcam_published(
    "gevit_pcam_p4_published",
    "Not equivariant, for old checkpoints: its last pool drops a row and a column.",
    group="p4",
)
gevit_pcam_p8_published = _pcam_published(
    "gevit_pcam_p8_published",
    "Not equivariant, for old checkpoints: 83.82 % on PCam as published, the best of all.",
    group="p8",
)
modern_gevit_pcam_patch2 = _modern(
    "modern_gevit_pcam_patch2",
    "Patches of 2 pixels first; 77.5 % with 1 % of PCam as published (validation).",
    stem_options=_patches(2),
)
modern_gevit_pcam_patch3 = _modern(
    "modern_gevit_pcam_patch3",
    "Patches of 3 pixels first; 78.5 % with 1 % of PCam as published (validation).",
    stem_options=_patches(3),
)
modern_gevit_pcam_patch6 = _modern(
    "modern_gevit_pcam_patch6",
    "Patches of 6 pixels first; 78.8 % with 1 % of PCam as published (validation).",
    stem_options=_patches(6),
)
modern_gevit_pcam_patch12 = _modern(
    "modern_gevit_pcam_patch12",
    "Patches of 12 pixels first; 75.5 % with 1 % of PCam as published (validation).",
    stem_options=_patches(12),
)
modern_gevit_pcam_patch16 = _modern(
    "modern_gevit_pcam_patch16",
    "Patches of 16 pixels first; 73.9 % with 1 % of PCam as published (validation).",
    stem_options=_patches(16),
)
gevit_pcam_gcnn_p4m = _exact(
    "gevit_pcam_gcnn_p4m",
    "An exact G-CNN first: the published hybrid, but truly invariant to the eight symmetries.",
)
gevit_digits_p4m = _digits(
    "gevit_digits_p4m",
    "Small enough for the embedded digits on a CPU core: one group convolution, two blocks.",
)
