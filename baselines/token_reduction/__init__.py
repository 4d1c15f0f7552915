"""Token reduction for ViTs: SWAG's nets, seven methods that wrap any ViT, and what they cost.

Importing it registers SWAG's nets with timm. May import `octic`, `vit` and `utils`.
"""

from baselines.token_reduction import swag
from baselines.token_reduction.reduced import Reduced

__all__ = ["Reduced", "swag"]
