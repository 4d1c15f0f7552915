"""Which pixels a pixel attends to: a window around it, or the whole map.

Letters in shapes: B images, N heads, t rows of queries out of H, W columns, g m v elements (query,
key, output), c channels of a head, d of a position, J key positions.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.gevit.groups import PlaneGroup
from baselines.gevit.positions import Offsets, global_offsets, local_offsets


class Window(nn.Module):
    """A p x p window, p odd; positions outside the map are not keys. Maps of any size."""

    copies = True  # every query gets keys and values of its own

    def __init__(self, size: int, group: PlaneGroup) -> None:
        super().__init__()
        self.size = size
        self.offsets = Offsets(local_offsets(size), group)

    def table_shape(self, order: int) -> tuple[int, ...]:
        """Shape of a published table of positions, for so many elements of the group."""
        return (order, self.size, self.size)

    def extra_repr(self) -> str:
        """What is attended to."""
        return f"window {self.size}"

    def num_keys(self, size: tuple[int, int]) -> int:
        """Positions that a query attends to on a map of that size."""
        return self.size**2

    def prepare(self, x: Tensor) -> Tensor:
        """Keys or values [B N c m H W] with a margin around the map."""
        return F.pad(x, (self.size // 2,) * 4)

    def content(self, queries: Tensor, keys: Tensor, rows: slice) -> Tensor:
        """Products of queries [B N t W g c] and prepared keys: [B N t W g m J]."""
        patches = self._patches(keys, rows)  # [B N t W c m J]
        products = queries @ patches.flatten(-2)
        return products.unflatten(-1, patches.shape[-2:])

    def position(self, queries: Tensor, embedded: Tensor, rows: slice) -> Tensor:
        """Products of queries [B N t W g 2d] and embedded offsets [v J 2d]: [B N t W g v J]."""
        return (queries @ embedded.flatten(0, 1).T).unflatten(-1, embedded.shape[:2])

    def outside(self, size: tuple[int, int], rows: slice, device: torch.device) -> Tensor | None:
        """Which keys lie outside a map of that size: bool [t W 1 1 J]."""
        height, width = size
        half = self.size // 2
        steps = torch.arange(-half, half + 1, device=device)
        y = torch.arange(rows.start, rows.stop, device=device)[:, None] + steps  # [t p]
        x = torch.arange(width, device=device)[:, None] + steps  # [W p]
        y_out, x_out = (y < 0) | (y >= height), (x < 0) | (x >= width)
        out = y_out[:, None, :, None] | x_out[None, :, None, :]  # [t W p p]
        return out.flatten(-2)[:, :, None, None]

    def mix(self, weights: Tensor, values: Tensor, rows: slice) -> Tensor:
        """Weighted sums of prepared values: weights [B N t W v m J] to [B N t W v c]."""
        patches = self._patches(values, rows)
        return weights.flatten(-2) @ patches.flatten(-2).mT

    def _patches(self, x: Tensor, rows: slice) -> Tensor:
        """Windows of prepared maps [B N c m H W]: [B N t W c m J]."""
        part = x[..., rows.start : rows.stop + self.size - 1, :]
        windows = part.unfold(-2, self.size, 1).unfold(-2, self.size, 1)  # [B N c m t W p p]
        return windows.permute(0, 1, 4, 5, 2, 3, 6, 7).flatten(-2)


class WholeMap(nn.Module):
    """All pixels of an M x M map, to which the offsets are scaled."""

    copies = False

    def __init__(self, side: int, group: PlaneGroup) -> None:
        super().__init__()
        self.side = side
        self.offsets = Offsets(global_offsets(side), group)

    def table_shape(self, order: int) -> tuple[int, ...]:
        """Shape of a published table of positions, for so many elements of the group."""
        return (order, *(self.side,) * 4)

    def extra_repr(self) -> str:
        """What is attended to."""
        return f"maps of {self.side}"

    def num_keys(self, size: tuple[int, int]) -> int:
        """Positions that a query attends to; ValueError for a map of another size."""
        if size != (self.side, self.side):
            raise ValueError(
                f"global attention was built for maps of {self.side} x {self.side}, not of "
                f"{size[0]} x {size[1]}; build the model for this image size, or with a window"
            )
        return self.side**2

    def prepare(self, x: Tensor) -> Tensor:
        """Keys or values [B N c m H W] as [B N c m J]."""
        return x.flatten(-2)

    def content(self, queries: Tensor, keys: Tensor, rows: slice) -> Tensor:
        """Products of queries [B N t W g c] and prepared keys: [B N t W g m J]."""
        products = queries.flatten(2, 4) @ keys.flatten(-2)
        return products.unflatten(2, queries.shape[2:5]).unflatten(-1, keys.shape[-2:])

    def position(self, queries: Tensor, embedded: Tensor, rows: slice) -> Tensor:
        """Products of queries [B N t W g 2d] and embedded offsets: [B N t W g v J]."""
        line = torch.arange(self.side, device=embedded.device)
        queried = line[rows]
        down = line - queried[:, None] + self.side - 1  # [t H]
        right = line - line[:, None] + self.side - 1  # [W W]
        place = down[:, None, :, None] * (2 * self.side - 1) + right[None, :, None, :]
        seen = embedded[:, place.flatten(-2)]  # [v t W J 2d]
        return torch.einsum("bntwgd,vtwjd->bntwgvj", queries, seen)

    def outside(self, size: tuple[int, int], rows: slice, device: torch.device) -> Tensor | None:
        """No key lies outside."""
        return None

    def mix(self, weights: Tensor, values: Tensor, rows: slice) -> Tensor:
        """Weighted sums of prepared values: weights [B N t W v m J] to [B N t W v c]."""
        sums = weights.flatten(-2).flatten(2, 4) @ values.flatten(-2).mT
        return sums.unflatten(2, weights.shape[2:5])


def make_neighbours(
    group: PlaneGroup, *, window: int | None, map_size: int | None
) -> Window | WholeMap:
    """A window of that side, or, without one, the whole map of that side."""
    if window:
        return Window(window, group)
    if not map_size:
        raise ValueError("attention needs a window, or map_size, the side of the map, without one")
    return WholeMap(map_size, group)
