"""Pointwise nonlinearities of mirror features: transform to the regular components, act, transform
back.

The transform is orthogonal and its own inverse: sums and differences of the two halves of each of
the leading axes, times sqrt(1/2).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octic.regular_gelu import regular_gelu
from utils.precision import at_least_float32
from utils.ranges import check_word

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def hadamard(num_signs: int) -> tuple[tuple[float, ...], ...]:
    """The orthogonal transform over `num_signs` signs, [G G] with G = 2^num_signs."""
    order = 2**num_signs
    return tuple(
        tuple((-1) ** (i & j).bit_count() / math.sqrt(order) for j in range(order))
        for i in range(order)
    )


class RegularActivation(nn.Module):
    """H act(H x) over features [... G C], G = 2^num_signs: f(g x) = g f(x) for changes of signs.

    kind: gelu (exact), gelu_tanh, or quick_gelu, x sigmoid(1.702 x).
    """

    def __init__(self, kind: str = "gelu", *, num_signs: int = 1) -> None:
        super().__init__()
        check_word("activation", kind, ACTIVATIONS)
        self.kind, self.num_signs = kind, num_signs
        self.transform = hadamard(num_signs)

    def forward(self, x: Tensor) -> Tensor:
        """Activate features whose last axis is [G C] flattened."""
        if self.kind == "gelu":
            return regular_gelu(x, self.transform)
        # Half-precision sums would be rounded twice.
        return self._turn(ACTIVATIONS[self.kind](self._turn(at_least_float32(x)))).to(x.dtype)

    def _turn(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (2,) * self.num_signs + (-1,))
        for axis in range(-1 - self.num_signs, -1):
            first, second = parts.unbind(axis)
            parts = torch.stack([first + second, first - second], dim=axis)
        return parts.flatten(-1 - self.num_signs) * math.sqrt(0.5) ** self.num_signs

    def extra_repr(self) -> str:
        """The function."""
        return self.kind
