"""The regular components of features: what the group permutes."""

import numpy as np
import torch
from torch import Tensor

from octic.actions import ToRegular
from octic.groups import Element, Group


def regular_action(element: Element, group: Group) -> np.ndarray:
    """Permutation matrix [G G] by which an element moves the regular components."""
    return np.rint(group.fourier.T @ group.action(element) @ group.fourier)


def to_regular(x: Tensor, group: Group) -> Tensor:
    """Regular components [... D] of a feature [... D], as a hybrid's plain half sees them."""
    return ToRegular(group)(x)


def from_regular(x: Tensor, group: Group) -> Tensor:
    """Feature [... D] of regular components [... D]."""
    matrix = torch.as_tensor(group.fourier, dtype=x.dtype)
    return (matrix @ x.unflatten(-1, (group.order, -1))).flatten(-2)
