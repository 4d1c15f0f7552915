"""GE-ViT: self-attention between pixels, equivariant to rotations and mirrorings of the plane.

Importing it registers the models with timm. May import `octic`, `vit` and `utils`.
"""

from baselines.gevit import models
from baselines.gevit.groups import get_group
from baselines.gevit.network import GEViT
from baselines.gevit.weights import load_published

__all__ = ["GEViT", "get_group", "load_published", "models"]
