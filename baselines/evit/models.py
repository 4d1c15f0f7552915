"""EViTs under their published names, registered with timm.

Each function takes any keyword of `EViT` to override its own, `base_keep_rate`, `drop_loc` and
`fuse_token` among them. EViT's `deit_{tiny,small,base}_patch16_224` and `deit_base_patch16_384` are
timm's models of these names, the same networks with the same names of weights; they are not
registered again.

Departs from EViT: every model accepts base_keep_rate and drop_loc; in EViT's code most fail.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from baselines.evit.network import EViT
from vit.models import build, entrypoint, size


def _make(rate: float, name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    own = {"base_keep_rate": rate} if kwargs.get("keep_rate") is None else {}
    return build(EViT, name, pretrained, **{**own, **kwargs})


def _evit(
    name: str, description: str, *, width: str, pixels: int, rate: float
) -> Callable[..., nn.Module]:
    """rate: the keep rate of blocks 3, 6 and 9."""
    cfg, presets = {"crop_pct": 0.875}, {"patch_size": 16, "img_size": pixels}
    make = partial(_make, rate)
    return entrypoint(__name__, make, cfg, name, description, **presets, **size(width))


deit_small_patch16_shrink_base = _evit(
    "deit_small_patch16_shrink_base",
    "EViT-DeiT-S: fused, 79.5 top-1 at a keep rate of 0.7, 3.0 G multiply-adds.",
    width="small",
    pixels=224,
    rate=0.7,
)
deit_base_patch16_shrink_base = _evit(
    "deit_base_patch16_shrink_base",
    "EViT-DeiT-B: 11.6 G multiply-adds, fused, at a keep rate of 0.7.",
    width="base",
    pixels=224,
    rate=0.7,
)
deit_small_patch16_224_shrink_base = _evit(
    "deit_small_patch16_224_shrink_base",
    "EViT-DeiT-S, under the name with its resolution.",
    width="small",
    pixels=224,
    rate=0.7,
)
deit_small_patch16_224_shrink = _evit(
    "deit_small_patch16_224_shrink",
    "EViT-DeiT-S at a keep rate of 0.7.",
    width="small",
    pixels=224,
    rate=0.7,
)
deit_small_patch16_272_shrink = _evit(
    "deit_small_patch16_272_shrink",
    "EViT-DeiT-S at 272 x 272 pixels and a keep rate of 0.7: 4.6 G, as much as DeiT-S at 224.",
    width="small",
    pixels=272,
    rate=0.7,
)
deit_small_patch16_224_shrink05 = _evit(
    "deit_small_patch16_224_shrink05",
    "EViT-DeiT-S at a keep rate of 0.5.",
    width="small",
    pixels=224,
    rate=0.5,
)
deit_small_patch16_304_shrink05 = _evit(
    "deit_small_patch16_304_shrink05",
    "EViT-DeiT-S at 304 x 304 pixels and a keep rate of 0.5: 81.0 top-1, read off a plot.",
    width="small",
    pixels=304,
    rate=0.5,
)
deit_small_patch16_288_shrink06 = _evit(
    "deit_small_patch16_288_shrink06",
    "EViT-DeiT-S at 288 x 288 pixels and a keep rate of 0.6: 4.5 G multiply-adds.",
    width="small",
    pixels=288,
    rate=0.6,
)
