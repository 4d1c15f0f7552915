"""Equivariant layers and Vision Transformers over the symmetries of the pixel grid.

May import: torch, timm, triton where present, and `vit`.
"""

from octic import models
from octic.groups import get_group
from octic.vision_transformer import OcticVisionTransformer

__all__ = ["OcticVisionTransformer", "get_group", "models"]
