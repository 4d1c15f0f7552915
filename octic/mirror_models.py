"""The mirror-equivariant ViTs of "Flopping for FLOPs" (Bokman et al. 2025), registered with timm.

Under their published names, which end in `_LS` and are not those of the octic nets in
`octic.models`: `d2_deit_*_LS`, every block equivariant to the left-right mirroring and the
classifier invariant; `hybrid_deit_*_LS`, the first half of the blocks equivariant;
`d2_inv_early_deit_*_LS`, invariant after that half. `vit.models` has their plain twins
`deit_*_LS`. Each function takes any keyword of `OcticVisionTransformer`, to override its own.
"""

from functools import partial

from octic.vision_transformer import OcticVisionTransformer
from vit.models import build, entrypoint, size

MIRROR = {
    "group": "mirror",
    "qkv_bias": True,
    "init_values": 1e-4,
    "octic_norm_eps": 1e-6,
    "scaled_patch_bias": True,
    "cls_token_std": 0.02,
    "pos_embed_std": 0.02,
}
# All blocks equivariant; invariant="power_spectrum" is the published --symmetrized-asym-feats.
EQUIVARIANT = {**MIRROR, "invariant": "trivial", "invariant_at": "head"}
HYBRID = {**MIRROR, "switch_basis": "regular"}
INVARIANT = {**MIRROR, "invariant": "power_spectrum", "invariant_proj": False}

_mirror = partial(
    entrypoint,
    __name__,
    partial(build, OcticVisionTransformer),
    {"first_conv": "patch_embed.lift8.conv_A1"},
)
_equivariant = partial(_mirror, **EQUIVARIANT)
_hybrid = partial(_mirror, **HYBRID)
_invariant = partial(_mirror, **INVARIANT)

d2_deit_tiny_patch16_LS = _equivariant(
    "d2_deit_tiny_patch16_LS", "Mirror-equivariant DeiT III ViT-Ti/16.", **size("tiny")
)
d2_deit_small_patch16_LS = _equivariant(
    "d2_deit_small_patch16_LS", "Mirror-equivariant DeiT III ViT-S/16.", **size("small")
)
d2_deit_medium_patch16_LS = _equivariant(
    "d2_deit_medium_patch16_LS", "Mirror-equivariant DeiT III ViT-M/16.", **size("medium")
)
d2_deit_base_patch16_LS = _equivariant(
    "d2_deit_base_patch16_LS",
    "Mirror-equivariant DeiT III ViT-B/16: 82.2 top-1 on ImageNet, read off a plot.",
    **size("base"),
)
d2_deit_large_patch16_LS = _equivariant(
    "d2_deit_large_patch16_LS",
    "Mirror-equivariant DeiT III ViT-L/16: 83.4 top-1 on ImageNet, read off a plot.",
    **size("large"),
)
d2_deit_huge_patch14_LS = _equivariant(
    "d2_deit_huge_patch14_LS",
    "Mirror-equivariant DeiT III ViT-H/14: 84.4 top-1 on ImageNet, read off a plot.",
    **size("huge", patch_size=14),
)
d2_deit_huge_patch14_52_LS = _equivariant(
    "d2_deit_huge_patch14_52_LS",
    "Mirror-equivariant DeiT III ViT-H/14 of 52 blocks.",
    **size("huge", depth=52, patch_size=14),
)
hybrid_deit_tiny_patch16_LS = _hybrid(
    "hybrid_deit_tiny_patch16_LS", "Mirror hybrid DeiT III ViT-Ti/16.", **size("tiny")
)
hybrid_deit_small_patch16_LS = _hybrid(
    "hybrid_deit_small_patch16_LS", "Mirror hybrid DeiT III ViT-S/16.", **size("small")
)
hybrid_deit_medium_patch16_LS = _hybrid(
    "hybrid_deit_medium_patch16_LS", "Mirror hybrid DeiT III ViT-M/16.", **size("medium")
)
hybrid_deit_base_patch16_LS = _hybrid(
    "hybrid_deit_base_patch16_LS",
    "Mirror hybrid DeiT III ViT-B/16: 83.0 top-1 on ImageNet, read off a plot.",
    **size("base"),
)
hybrid_deit_large_patch16_LS = _hybrid(
    "hybrid_deit_large_patch16_LS",
    "Mirror hybrid DeiT III ViT-L/16: 84.5 top-1 on ImageNet, read off a plot.",
    **size("large"),
)
hybrid_deit_huge_patch14_LS = _hybrid(
    "hybrid_deit_huge_patch14_LS",
    "Mirror hybrid DeiT III ViT-H/14: 85.0 top-1 on ImageNet, read off a plot.",
    **size("huge", patch_size=14),
)
hybrid_deit_huge_patch14_52_LS = _hybrid(
    "hybrid_deit_huge_patch14_52_LS",
    "Mirror hybrid DeiT III ViT-H/14 of 52 blocks.",
    **size("huge", depth=52, patch_size=14),
)
d2_inv_early_deit_tiny_patch16_LS = _invariant(
    "d2_inv_early_deit_tiny_patch16_LS", "Mirror-invariant DeiT III ViT-Ti/16.", **size("tiny")
)
d2_inv_early_deit_small_patch16_LS = _invariant(
    "d2_inv_early_deit_small_patch16_LS", "Mirror-invariant DeiT III ViT-S/16.", **size("small")
)
d2_inv_early_deit_medium_patch16_LS = _invariant(
    "d2_inv_early_deit_medium_patch16_LS", "Mirror-invariant DeiT III ViT-M/16.", **size("medium")
)
d2_inv_early_deit_base_patch16_LS = _invariant(
    "d2_inv_early_deit_base_patch16_LS", "Mirror-invariant DeiT III ViT-B/16.", **size("base")
)
d2_inv_early_deit_large_patch16_LS = _invariant(
    "d2_inv_early_deit_large_patch16_LS", "Mirror-invariant DeiT III ViT-L/16.", **size("large")
)
d2_inv_early_deit_huge_patch14_LS = _invariant(
    "d2_inv_early_deit_huge_patch14_LS",
    "Mirror-invariant DeiT III ViT-H/14.",
    **size("huge", patch_size=14),
)
d2_inv_early_deit_huge_patch14_52_LS = _invariant(
    "d2_inv_early_deit_huge_patch14_52_LS",
    "Mirror-invariant DeiT III ViT-H/14 of 52 blocks.",
    **size("huge", depth=52, patch_size=14),
)
