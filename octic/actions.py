"""How group elements move features and tokens, and the change to the regular components."""

import math

import numpy as np
import torch
from torch import Tensor

from octic.groups import Element, Group
from octic.tables import Tables


def act(x: Tensor, element: Element, group: Group) -> Tensor:
    """Move a feature [... D] by a group element (its channels alone)."""
    matrix = torch.as_tensor(group.action(element), dtype=x.dtype, device=x.device)
    return (matrix @ x.unflatten(-1, (group.order, -1))).flatten(-2)


def act_on_tokens(
    x: Tensor, element: Element, group: Group, grid: tuple[int, int], num_prefix_tokens: int = 0
) -> Tensor:
    """Move tokens [B T D]: patches over their h x w grid, and the channels of every token."""
    prefix, patches = x[:, :num_prefix_tokens], x[:, num_prefix_tokens:]
    moved = element.on_images(patches.unflatten(1, grid).movedim(-1, 1)).movedim(1, -1)
    return act(torch.cat([prefix, moved.flatten(1, 2)], dim=1), element, group)


class ToRegular(Tables):
    """Features [... D] to their regular components [... D], element by element."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.order = group.order
        # The transform's entries are +- sqrt(n / |G|): held as +- n, exact in every dtype.
        signed = np.sign(group.fourier.T) * group.fourier.T**2 * group.order
        self.hold_tables(squares=np.rint(signed).astype(np.int8))

    def forward(self, x: Tensor) -> Tensor:
        """Change the basis of x."""
        parts = x.unflatten(-1, (self.order, -1))
        if self.order == 2:
            # Sums and differences: no product that TF32 or autocast would round.
            first, second = (parts * math.sqrt(0.5)).unbind(-2)
            return torch.cat([first + second, first - second], dim=-1)
        squares = self.table("squares", x).to(x.dtype)
        transform = squares.sign() * (squares.abs() / self.order).sqrt()
        return (transform @ parts).flatten(-2)
