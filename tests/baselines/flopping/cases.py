"""Small nets with noticeable weights, and the mirror's action on their features."""

import torch
from torch import Tensor, nn

from baselines.flopping.convnext import MirrorConvNeXt
from baselines.flopping.resmlp import MirrorResMlp

RESMLP = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_classes": 5}
CONVNEXT = {"img_size": 64, "depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24), "num_classes": 5}
ISOTROPIC = {"img_size": 32, "patch_size": 4, "depths": (2,), "dims": (16,), "num_classes": 5}


def shaken(module: nn.Module) -> nn.Module:
    """In float64, with random parameters: no zero or identity initialisation is left."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double().eval()


def resmlp(**options: object) -> MirrorResMlp:
    return shaken(MirrorResMlp(**{**RESMLP, **options}))


def convnext(**options: object) -> MirrorConvNeXt:
    return shaken(MirrorConvNeXt(**{**CONVNEXT, **options}))


def isotropic(**options: object) -> MirrorConvNeXt:
    return shaken(MirrorConvNeXt(**{**ISOTROPIC, **options}))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def images(net: nn.Module, height: int | None = None, width: int | None = None) -> Tensor:
    """Two random images of the net's size, or another one."""
    return random(2, net.in_chans, height or net.img_size[0], width or net.img_size[1])


def relative(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def signed(x: Tensor) -> Tensor:
    """Features [... D] with the odd half negated."""
    even, odd = x.chunk(2, dim=-1)
    return torch.cat([even, -odd], dim=-1)


def mirrored(x: Tensor) -> Tensor:
    """The mirror's action on maps [B h w D]."""
    return signed(x).flip(2)


def mirrored_pairs(x: Tensor) -> Tensor:
    """The mirror's action on pairs [B n 2 D]."""
    even, odd = x.unbind(-2)
    return torch.stack([signed(even), -signed(odd)], dim=-2)
