"""Sizes of the tiles that Triton kernels work on."""

import triton


def ceil_div(count: int, size: int) -> int:
    """ceil(count / size); triton.cdiv takes 10 us when it is called outside of a kernel."""
    return -(-count // size)


def tile_width(channels: int, least: int, most: int) -> int:
    """Channels of a tile: the largest power of two that divides, so that no lane is masked.

    If that is below `least`, the next power of two above `channels`. At most `most` in either case.
    """
    divisor = channels & -channels
    return min(divisor if divisor >= least else triton.next_power_of_2(channels), most)
