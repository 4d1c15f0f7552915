"""EViT: a DeiT that keeps the patch tokens its class token attends to, registered with timm.

Liang et al. 2022, "Not All Patches are What You Need". Importing it registers the models. May
import `vit`, `utils` and `baselines.tapped`.
"""

from baselines.evit import models
from baselines.evit.network import EViT

__all__ = ["EViT", "models"]
