"""Published files of the mirror nets of "Flopping for FLOPs" (Bokman et al. 2025).

There "sym" is the invariant half of the channels, irrep A1, and "asym" the half that changes sign,
A2. Tokens stand in mirrored order: the left half of the grid row by row, then the right half with
its columns reversed. That order is stored as an integer parameter and tells the grid; ours is
raster order, which gives the same outputs.

Letters: h w a grid, N = h w, C channels of a half.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

PERMUTATION = "patch_embed.flatten_and_permute.permutation"
STEM = "patch_embed.proj_sym.weight"  # which only these files have
POSITIONS = ("pos_embed.0", "pos_embed.1")
_LAYER = re.compile(r"(^|\.)(alpha|linear)_(sym|asym)(?=\.|$)")
_LIFT = re.compile(r"^patch_embed\.proj_(sym|asym)\.")
_KINDS = {"alpha": "alpha", "linear": "lin"}
_IRREPS = {"sym": "A1", "asym": "A2"}


def mirror_name(name: str) -> str:
    """Our name of a published one; other names stay."""
    name = _LIFT.sub(lambda match: f"patch_embed.lift8.conv_{_IRREPS[match[1]]}.", name)
    return _LAYER.sub(lambda match: f"{match[1]}{_KINDS[match[2]]}_{_IRREPS[match[3]]}", name)


def mirrored_order(height: int, width: int) -> Tensor:
    """Raster index of each token [N] in the mirrored order."""
    raster = torch.arange(height * width).view(height, width)
    left, right = raster.chunk(2, dim=1)
    return torch.cat([left.flatten(), right.flip(1).flatten()])


def to_slabs(
    found: Mapping[str, Tensor], order: Tensor | None, grid: tuple[int, int] | None
) -> dict[str, Tensor]:
    """Weights with published positions [1 N/2 C] as our slabs [h w/2 C].

    order: the file's stored order of tokens, which tells its grid. Without one it is `grid` where
    that has as many patches, else a square. Raises ValueError for an order that is none.
    """
    found = dict(found)
    stored = [name for name in POSITIONS if name in found]
    if not stored:
        return found
    count = 2 * found[stored[0]].shape[1]
    height, width = _grid_of_file(count, order, grid)
    for name in stored:
        found[name] = found[name].reshape(height, width // 2, -1)
    return found


def _grid_of_file(
    count: int, order: Tensor | None, grid: tuple[int, int] | None
) -> tuple[int, int]:
    if order is not None and order.device.type != "meta":
        return _grid_of_order(order.cpu(), count)
    if grid is not None and grid[0] * grid[1] == count:
        return grid
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(
            f"{POSITIONS[0]} of the file is for {count} patches, which are no square grid, and the "
            f"file lacks {PERMUTATION}, which would tell it"
        )
    return side, side


def _grid_of_order(order: Tensor, count: int) -> tuple[int, int]:
    """Height and width; half a row is the first run of consecutive indices."""
    left = order[: len(order) // 2]
    ends = (left[1:] != left[:-1] + 1).nonzero()
    width = 2 * (int(ends[0]) + 1 if len(ends) else len(left))
    height = len(order) // max(1, width)
    if len(order) != count or not torch.equal(order, mirrored_order(height, width)):
        raise ValueError(
            f"{PERMUTATION} is no order of the tokens of a grid: the published moving average "
            "damages it; load the weights themselves (the key 'model'), not their average"
        )
    return height, width
