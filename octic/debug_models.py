"""Two nets to find where a hybrid's time goes: plain ViTs with mirror layers on channel halves.

They are not equivariant, since nothing makes the halves of a plain patch embedding symmetric and
antisymmetric. Published with "Flopping for FLOPs" for the debugging of timings.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from octic.attention import OcticAttention
from octic.block import OcticBlock
from octic.layers import OcticLayerNorm
from vit.block import Block
from vit.models import DEIT, build, entrypoint, size
from vit.vision_transformer import VisionTransformer

MIRROR = "mirror"


class _HalvesAttention(OcticAttention):
    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, group=MIRROR, **options)


class _HalvesBlock(Block):
    """A plain block whose attention is that of the mirror group, on channel halves."""

    attention_class = _HalvesAttention


class HalvesAttentionViT(VisionTransformer):
    """Plain ViT whose attention alone is that of the mirror group."""

    block_class = _HalvesBlock


class _MirrorBlock(OcticBlock):
    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, group=MIRROR, **options)


class HalvesViT(VisionTransformer):
    """Plain patch embedding, positions and tokens; blocks and norm of the mirror group."""

    block_class = _MirrorBlock

    def __init__(self, *, norm_eps: float = 1e-6, **options: Any) -> None:
        super().__init__(norm_eps=norm_eps, **options)
        self.norm = OcticLayerNorm(self.embed_dim, eps=norm_eps, group=MIRROR)


def _tiny(net: type[VisionTransformer], name: str, description: str) -> Callable[..., nn.Module]:
    presets = {**size("tiny"), **DEIT}
    return entrypoint(__name__, partial(build, net), {}, name, description, **presets)


debug_hybrid_deit_tiny_patch16_LS = _tiny(
    HalvesAttentionViT,
    "debug_hybrid_deit_tiny_patch16_LS",
    "ViT-Ti/16 with mirror attention on channel halves.",
)
debug_ultra_hybrid_deit_tiny_patch16_LS = _tiny(
    HalvesViT,
    "debug_ultra_hybrid_deit_tiny_patch16_LS",
    "ViT-Ti/16 with mirror blocks on channel halves.",
)
