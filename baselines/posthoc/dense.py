"""Maps of patches that turn with the image: the mean of all copies' maps, turned back.

Letters in shapes: B images, T copies, h w grid of patches, D channels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from baselines.posthoc.groups import CopyGroup
from vit.backbone import Features


def average_features(
    model: Any,
    group: CopyGroup,
    images: Tensor,
    layers: Sequence[int],
    chunk: int,
    join: Callable[[Tensor], Tensor] | None,
) -> list[Features]:
    """Features of the asked blocks over all copies of images [B C H W]; see `Symmetrized.features`.

    join: class tokens [B T D] to [B D]; None is their mean. A map turned by other angles than
    quarter turns only counts in the cells that it covers.
    """
    images = group.prepare(images)
    size = chunk or len(group)
    tokens: list[list[Tensor]] = [[] for _ in layers]
    sums: list[Tensor | None] = [None] * len(layers)
    shares: list[Tensor | None] = [None] * len(layers)
    for start in range(0, len(group), size):
        indices = range(start, min(start + size, len(group)))
        copies = torch.cat([group.copy(images, index) for index in indices])
        for place, found in enumerate(model.features(copies, layers)):
            apart = (len(indices), len(images))
            tokens[place] += found.cls.unflatten(0, apart).unbind(0)
            if found.patches is None:
                continue
            maps = found.patches.unflatten(0, apart).unbind(0)
            for index, patches in zip(indices, maps, strict=True):
                back, share = group.undo(patches, index)
                total, seen = sums[place], shares[place]
                sums[place] = back if total is None else total + back
                shares[place] = share if seen is None else seen + share
    return [
        Features(_joined(tokens[place], join), _mean(sums[place], shares[place]))
        for place in range(len(layers))
    ]


def _joined(tokens: list[Tensor], join: Callable[[Tensor], Tensor] | None) -> Tensor:
    stacked = torch.stack(tokens, dim=1)
    return stacked.mean(dim=1) if join is None else join(stacked)


def _mean(total: Tensor | None, share: Tensor | None) -> Tensor | None:
    if total is None or share is None:
        return None
    return total / share[..., None].to(total.dtype)  # at least 1: the identity covers all cells
