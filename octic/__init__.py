"""Equivariant layers and Vision Transformers over the symmetries of the pixel grid.

May import: torch, timm, numpy, triton where present, and `vit`.
"""

from octic import debug_models, mirror_models, models
from octic.groups import get_group, make_group
from octic.vision_transformer import OcticVisionTransformer

__all__ = [
    "OcticVisionTransformer",
    "debug_models",
    "get_group",
    "make_group",
    "mirror_models",
    "models",
]
