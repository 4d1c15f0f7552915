"""Small hosts of every kind, and every method with options that fit them."""

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn

import octic.models
import vit.models
from baselines.token_reduction.presets import make_reducer
from baselines.token_reduction.reduced import Reduced
from baselines.token_reduction.reducer import Reducer
from vit.adapters import timm_backbone

CLASSES = 5
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "num_heads": 4}
DEPTH = 6
SIDE = 8  # patches a side


def timm_net(**options: Any) -> nn.Module:
    sizes = {**SMALL, "depth": DEPTH, "num_classes": CLASSES}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **options})


def ours(**options: Any) -> nn.Module:
    sizes = {**SMALL, "depth": DEPTH, "num_classes": CLASSES, "init_values": 1.0}
    return vit.models.deit_small_patch16_LS(**{**sizes, **options})


def dinov2(**options: Any) -> nn.Module:
    sizes = {**SMALL, "depth": DEPTH, "init_values": 1.0, "num_register_tokens": 3}
    return vit.models.dinov2_vit_small_patch16(**{**sizes, **options})


def hybrid(**options: Any) -> nn.Module:
    """Blocks 0 and 1 octic, 2 to 5 plain."""
    sizes = {**SMALL, "depth": DEPTH, "num_classes": CLASSES, "init_values": 1.0}
    sizes["octic_equi_break_layer"] = 2
    return octic.models.hybrid_deit_small_patch16(**{**sizes, **options})


HOSTS: dict[str, Callable[..., nn.Module]] = {
    "timm": timm_net,
    "timm qk_norm": lambda **o: timm_net(qk_norm=True, init_values=0.5, reg_tokens=2, **o),
    "timm scaled": lambda **o: timm_net(scale_attn_norm=True, scale_mlp_norm=True, **o),
    "timm distilled": lambda **o: timm.create_model(
        "deit_tiny_distilled_patch16_224", **SMALL, depth=DEPTH, num_classes=CLASSES, **o
    ),
    "timm adapter": lambda **o: timm_backbone(
        "vit_tiny_patch16_224", **SMALL, depth=DEPTH, num_classes=CLASSES, **o
    ),
    "ours": ours,
    "dinov2": dinov2,
    "hybrid": hybrid,
    "pooled": lambda **o: ours(global_pool="avg", **o),
}

# Options that reduce a lot at this size, in blocks that are plain in every host.
METHODS: dict[str, dict[str, Any]] = {
    "hourglass": {"location": 3, "num_clusters": 16},
    "evit": {"keep_rate": 0.6, "locations": [2, 4]},
    "tome": {"r": [0, 0, 9, 8, 7, 6]},
    "evo_vit": {"location": 3, "keep_rate": 0.5},
    "ats": {"locations": [2, 4], "num_samples": 24},
    "act": {"start": 2, "query_hashes": 6, "group_keys": True, "key_hashes": 6},
    "smyrf": {"start": 2, "num_hashes": 4, "query_cluster_size": 12},
}


class Opened(Reducer):
    """Enters every block and changes nothing."""

    def works_inside(self, index: int) -> bool:
        return True


def reducer(method: str, **options: Any) -> Reducer:
    return make_reducer(method, **{**METHODS[method], **options})


def net_of(host: str, **options: Any) -> nn.Module:
    """A host with weights far from their start, so that tokens differ."""
    torch.manual_seed(0)
    net = HOSTS[host](**options)
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3 if "token" in name or "pos" in name else 0.12)
    return net.eval()


def reduced(host: str, method: str, **options: Any) -> Reduced:
    return Reduced(net_of(host), reducer(method, **options)).eval()


def images(count: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))
