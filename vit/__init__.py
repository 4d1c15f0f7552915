"""The Backbone contract, the plain Vision Transformer and adapters of other networks.

May import: torch, timm, numpy and safetensors.
"""

from vit import models
from vit.vision_transformer import VisionTransformer

__all__ = ["VisionTransformer", "models"]
