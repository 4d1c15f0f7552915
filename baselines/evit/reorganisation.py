"""Token reorganisation: how many tokens a block keeps, and which patches they came from.

Liang et al. 2022, "Not All Patches are What You Need: Expediting Vision Transformers via Token
Reorganizations", section 3. Pure functions on tensors. The class token comes first and always
stays; indices count the tokens after it.

Letters in shapes: B images, n tokens after the class token, k of them kept, D channels, N patches
in a grid of h x w.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from baselines.selection import keep_count
from utils.ranges import check_rate

FUSED = -1  # origin of a token that was fused from many patches


def tokens_to_keep(
    count: int,
    own_rate: float,
    called_rate: float | None = None,
    tokens: int | None = None,
    *,
    exact: bool = True,
) -> int:
    """How many of `count` tokens a block with a rate of its own keeps; `count` for all.

    The rate of a call replaces that of each block that drops tokens, and a rate of 1 switches off
    all dropping; `tokens` is a number for every block.
    """
    if tokens is not None:
        if not 1 <= tokens <= count:
            raise ValueError(f"{tokens} tokens to be kept of {count}")
        return tokens
    if called_rate is not None:
        check_rate("keep_rate", called_rate)
    rate = own_rate if called_rate is None else called_rate
    return count if own_rate >= 1 or rate >= 1 else keep_count(rate, count, exact=exact)


def follow_origins(origins: Tensor, kept: Tensor, *, fuse: bool) -> Tensor:
    """Patches [B k(+1)] that tokens came from, after a block that kept `kept` of `origins` [B n].

    A fused token has the origin `FUSED` from then on.
    """
    left = origins.gather(1, kept)
    return torch.nn.functional.pad(left, (0, 1), value=FUSED) if fuse else left


def patch_indices(kept: Sequence[Tensor], *, fuse: bool) -> list[Tensor]:
    """Indices of each dropping block [B k] as indices of patches, `FUSED` for a fused token.

    Departs from EViT: there a kept fused token counts as patch 0.
    """
    found: list[Tensor] = []
    for indices in kept:
        if found:
            before = torch.nn.functional.pad(found[-1], (0, int(fuse)), value=FUSED)
            indices = before.gather(1, indices)
        found.append(indices)
    return found


def patch_mask(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which cells of a grid are among the patches [B k]: booleans [B h w]."""
    count = grid[0] * grid[1]
    spots = torch.where(patches == FUSED, count, patches)
    mask = torch.zeros(len(patches), count + 1, dtype=torch.bool, device=patches.device)
    return mask.scatter_(1, spots, True)[:, :count].unflatten(1, grid)


def scatter_tokens(onto: Tensor, tokens: Tensor, origins: Tensor) -> Tensor:
    """Patches [B N D] with the tokens [B k D] at their origins; a fused one is left out."""
    spots = torch.where(origins == FUSED, onto.shape[1], origins)
    room = torch.nn.functional.pad(onto, (0, 0, 0, 1))
    return room.scatter(1, spots[..., None].expand_as(tokens), tokens)[:, :-1]
