"""How group elements move features and tokens, and the change to the regular components."""

import torch
from torch import Tensor

from octic.groups import Element, Group


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


def to_regular(x: Tensor, group: Group) -> Tensor:
    """Regular components [... D] (element by element) of a feature [... D]."""
    matrix = torch.as_tensor(group.fourier, dtype=x.dtype, device=x.device)
    return (matrix.T @ x.unflatten(-1, (group.order, -1))).flatten(-2)


def from_regular(x: Tensor, group: Group) -> Tensor:
    """Feature [... D] of regular components [... D]."""
    matrix = torch.as_tensor(group.fourier, dtype=x.dtype, device=x.device)
    return (matrix @ x.unflatten(-1, (group.order, -1))).flatten(-2)
