"""Offsets from query to key, transformed by every element of the group, and embedded.

Letters in shapes: G group elements, p side of the window, P = p p its cells, M side of a map that
attends globally, d channels of a position.
"""

import numpy as np
import torch
from torch import Tensor, nn

from baselines.gevit.groups import PlaneGroup
from baselines.gevit.layers import GroupNorm

HIDDEN = 16  # channels inside the position functions


def local_offsets(size: int) -> np.ndarray:
    """Offset (x right, y down) of each cell of a p x p window, in [-1, 1]: float64 [P 2]."""
    if not isinstance(size, int) or size < 1 or size % 2 == 0:
        raise ValueError(
            f"a window must have an odd side, to have a pixel in its middle; {size} is even"
            if size > 0 and size % 2 == 0
            else f"a window must have a positive odd side, not {size}"
        )
    half = (size - 1) // 2
    line = np.arange(-half, half + 1) / max(half, 1)
    return _grid(line)


def global_offsets(side: int) -> np.ndarray:
    """Offsets between any two pixels of an M x M map, over M - 1: float64 [(2M-1)^2 2].

    The offset (x, y) in pixels is in row (y + M - 1)(2M - 1) + x + M - 1. Departs from GE-ViT,
    which divides by zero on a map of one pixel: its only offset is 0 here.
    """
    if side < 1:
        raise ValueError(f"a map has a positive side, not {side}")
    return _grid(np.arange(1 - side, side) / max(side - 1, 1))


def turned(offsets: np.ndarray, group: PlaneGroup) -> tuple[np.ndarray, np.ndarray]:
    """Row and column coordinate of offsets [N 2] under every element: float64 [G N] each."""
    matrices = group.matrices()
    x, y = offsets[:, 0], offsets[:, 1]
    cols = matrices[:, 0, 0, None] * x + matrices[:, 0, 1, None] * y
    rows = matrices[:, 1, 0, None] * x + matrices[:, 1, 1, None] * y
    return rows, cols


class PositionFunction(nn.Sequential):
    """A learned function of one coordinate, scalar -> d channels, the same for all elements.

    Because the norm's eps is tiny and biases start at zero, an untrained one sees only the sign.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(
            nn.Conv2d(1, HIDDEN, 1), GroupNorm(HIDDEN), nn.SiLU(), nn.Conv2d(HIDDEN, dim, 1)
        )

    def forward(self, coordinates: Tensor) -> Tensor:
        """Embedding [... d] of coordinates [...]."""
        flat = coordinates.to(self[0].weight.dtype).reshape(-1, 1, 1, 1)
        return super().forward(flat).reshape(*coordinates.shape, -1)


class Offsets(nn.Module):
    """Coordinates of all offsets under all elements, as buffers outside the state dict.

    float64 whatever the parameters are, so that no rounding breaks the equivariance.
    """

    rows: Tensor  # [G N]
    cols: Tensor  # [G N]

    def __init__(self, offsets: np.ndarray, group: PlaneGroup) -> None:
        super().__init__()
        rows, cols = turned(offsets, group)
        self.register_buffer("rows", torch.as_tensor(rows), persistent=False)
        self.register_buffer("cols", torch.as_tensor(cols), persistent=False)

    def forward(self, row_function: nn.Module, col_function: nn.Module) -> Tensor:
        """Embedded row and column coordinate side by side [G N 2d]."""
        return torch.cat([row_function(self.rows), col_function(self.cols)], dim=-1)


def _grid(line: np.ndarray) -> np.ndarray:
    y, x = np.meshgrid(line, line, indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=-1)
