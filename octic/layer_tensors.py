"""The tensors of an equivariant linear layer: what it trains, and the matrices made of that.

Letters: L one-dimensional irreps, their matrices [C' C]; the two-dimensional one's [Q' Q].
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Sources(NamedTuple):
    """The tensors that the matrices of one layer are made of.

    weights: of the L = `lines` one-dimensional irreps, then of the two-dimensional one if there is
    one. factors: none at all, or for each weight the factors of its rows; the first ones also scale
    the bias.
    """

    weights: Sequence[Tensor]
    bias: Tensor | None
    factors: Sequence[Tensor]
    lines: int

    @property
    def tensors(self) -> list[Tensor]:
        """Weights, bias and factors in one list, in this order."""
        return [*self.weights, *([] if self.bias is None else [self.bias]), *self.factors]


class Matrices(NamedTuple):
    """The matrices of a layer: [L C' C], [Q' Q] or None, and the bias [C'] or None."""

    lines: Tensor
    plane: Tensor | None
    bias: Tensor | None
