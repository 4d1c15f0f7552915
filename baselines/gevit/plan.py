"""The layers of a GE-ViT and the sizes of its maps, computed before anything is built.

A setting that cannot be equivariant is refused here: a pool of stride 2 on an odd extent drops the
last row or column, and a turned image loses another one.
"""

from collections.abc import Sequence
from typing import NamedTuple

from utils.ranges import check_count

Size = tuple[int, int]
ODD = (
    "a pool of stride 2 drops a row or column of {0} x {1}, so turned or mirrored images give "
    "other features; {2}"
)


class LayerPlan(NamedTuple):
    """One block of attention."""

    in_channels: int
    out_channels: int
    crop: int
    size: Size  # of the incoming map
    reduction: int  # pixels of the image per step on the outgoing map


class Plan(NamedTuple):
    """All stages between lifting and classifier."""

    stages: list[list[LayerPlan]]
    pools: list[bool]  # after which stage the map is halved


def make_plan(
    *,
    size: Size,
    num_channels: int,
    block_sizes: Sequence[int],
    expansion: int | Sequence[int] | None,
    crop: int | Sequence[int] | None,
    pool_last: bool,
    even_pools: bool,
    reduction: int = 1,
) -> Plan:
    """Widths, crops and sizes of all blocks for a map of `size` after the stem.

    expansion: by how much the first block of each stage widens; a stage of no blocks widens
    nothing. crop: pixels off each side after each block. even_pools: refuse pools of odd extents.
    ValueError, in one line, for lists of another length, maps that vanish and odd pools.
    """
    counts = list(block_sizes) if isinstance(block_sizes, Sequence) else []
    for count in counts:
        check_count("block_sizes", count)
    if not sum(counts):
        raise ValueError(
            f"block_sizes are numbers of blocks, 0 or more each and some at least, not "
            f"{counts or block_sizes}"
        )
    expansions = _spread("expansion", expansion or 1, len(block_sizes), "stage")
    crops = iter(_spread("crop", crop or 0, sum(block_sizes), "block"))
    stages: list[list[LayerPlan]] = []
    pools: list[bool] = []
    channels = num_channels
    for stage, count in enumerate(block_sizes):
        pooled = pool_last or stage < len(block_sizes) - 1
        blocks = []
        for block in range(count):
            out = channels * (expansions[stage] or 1) if block == 0 else channels
            cut = next(crops)
            blocks.append(LayerPlan(channels, out, cut, size, reduction))
            size = (size[0] - 2 * cut, size[1] - 2 * cut)
            channels = out
            if min(size) < 1:
                raise ValueError(
                    f"nothing is left of the map after the crops up to block {block} of stage "
                    f"{stage}; crop less, or give larger images"
                )
        if pooled:
            size, reduction = _halved(size, stage, even_pools), 2 * reduction
        stages.append(blocks)
        pools.append(pooled)
    return Plan(stages, pools)


def _halved(size: Size, stage: int, even: bool) -> Size:
    if min(size) < 2:
        raise ValueError(f"a map of {size[0]} x {size[1]} after stage {stage} cannot be halved")
    if even and (size[0] % 2 or size[1] % 2):
        way = (
            f"after stage {stage}: choose img_size, crop or the stem so that it is even there, or "
            "build the network that is not equivariant with allow_odd=True"
        )
        raise ValueError(ODD.format(*size, way))
    return (size[0] // 2, size[1] // 2)


def _spread(name: str, value: int | Sequence[int], count: int, what: str) -> list[int]:
    values = list(value) if isinstance(value, Sequence) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} {what}s: {values}")
    found = [one or 0 for one in values]
    for one in found:
        check_count(name, one)
    return found
