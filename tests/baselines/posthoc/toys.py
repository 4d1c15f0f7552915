"""Small classifiers of every kind that can be wrapped."""

from collections.abc import Callable

import timm
import torch
import torchvision
from torch import nn

import octic.models
from baselines.posthoc.vision_transformer import SmallVisionTransformer
from evaluation.adapters import torchvision_backbone
from vit.adapters import timm_backbone

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
CLASSES = 5


def octic_net() -> nn.Module:
    return octic.models.hybrid_deit_small_patch16(**SMALL, num_classes=CLASSES, init_values=1.0)


def timm_net(name: str = "vit_tiny_patch16_224") -> nn.Module:
    return timm.create_model(name, **SMALL, num_classes=CLASSES)


def adapted() -> nn.Module:
    return timm_backbone("vit_tiny_patch16_224", **SMALL, num_classes=CLASSES)


def torchvision_vit() -> nn.Module:
    sizes = {"patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
    net = torchvision_backbone("vit_b_16", image_size=32, num_classes=CLASSES, **sizes)
    nn.init.normal_(net.net.heads.head.weight)  # torchvision starts it at zero
    return net


def small_vit() -> nn.Module:
    return SmallVisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, hidden_dim=64, depth=2, num_classes=CLASSES
    )


def pair() -> tuple[Callable, Callable]:
    body = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return body, nn.Linear(64, CLASSES)


KINDS: dict[str, Callable] = {
    "octic": octic_net,
    "timm": timm_net,
    "timm distilled": lambda: timm_net("deit_tiny_distilled_patch16_224"),
    "timm adapter": adapted,
    "torchvision": lambda: torchvision.models.resnet18(num_classes=CLASSES),
    "torchvision adapter": torchvision_vit,
    "small": small_vit,
    "pair": pair,
}


def make(kind: str):
    torch.manual_seed(0)
    return KINDS[kind]()


def images(count: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))
