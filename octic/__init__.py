"""Equivariant layers and Vision Transformers over the symmetries of the pixel grid.

May import: torch, timm, triton where present, and `vit`.
"""

from octic import decompositions, models
from octic.groups import get_group
from octic.vision_transformer import OcticVisionTransformer

__all__ = ["OcticVisionTransformer", "decompositions", "get_group", "models"]
