"""Mirror-equivariant ResMLP and ConvNeXt with their plain twins, registered with timm.

Bokman et al. 2025, "Flopping for FLOPs". May import `octic`, `vit` and `utils`. The ViTs of the
paper are those of `octic` with `group="mirror"`.
"""

from baselines.flopping import models
from baselines.flopping.convnext import MirrorConvNeXt
from baselines.flopping.resmlp import MirrorResMlp

__all__ = ["MirrorConvNeXt", "MirrorResMlp", "models"]
