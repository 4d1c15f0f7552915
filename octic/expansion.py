"""Symmetric filters on a grid: which are trained, on which part of it, and how they spread.

Only values on the fundamental slab of a patch or of a grid of positions are free (a quarter for
D4); the group moves them to all other cells. A component (irrep, i, copy) of the whole filter is
the sum over elements g and columns j of rho(g)_ij times the slab filter j moved by g (Flopping for
FLOPs, Appendix; the octic lift).
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from octic.groups import Group, Irrep


@dataclass(frozen=True)
class Slot:
    """One set of filters on the fundamental slab: which irrep, which copy, which column."""

    name: str
    irrep: int
    copy: int
    column: int


class Sums(NamedTuple):
    """A sparse linear map: output n is the sum over k of signs[n, k] * input[source[n, k]]."""

    source: np.ndarray  # [N K]
    signs: np.ndarray  # [N K], -1, 0 or 1

    def transposed(self, inputs: int) -> "Sums":
        """The map back, from the N outputs to so many inputs; 0 fills rows that are shorter."""
        outputs, terms = self.signs.nonzero()
        targets = self.source[outputs, terms]
        order = np.argsort(targets, kind="stable")
        targets, outputs, terms = targets[order], outputs[order], terms[order]
        counts = np.bincount(targets, minlength=inputs)
        place = np.arange(len(targets)) - (counts.cumsum() - counts)[targets]
        source, signs = (np.zeros((inputs, counts.max()), array.dtype) for array in self)
        source[targets, place], signs[targets, place] = outputs, self.signs[outputs, terms]
        return Sums(source, signs)


class Expansion(NamedTuple):
    """How filters on the slab become symmetric filters on the whole square.

    spread: from values (slot, cell of the slab) to values (component, pixel).
    """

    spread: Sums
    slab: tuple[int, int]  # height and width of the slab


@cache
def slots(group: Group) -> tuple[Slot, ...]:
    """The sets of slab filters that the lift and the position embedding train."""
    return tuple(
        Slot(_slot_name(irrep, copy, column), index, copy, column)
        for index, irrep in enumerate(group.irreps)
        for copy in range(irrep.copies)
        for column in range(irrep.commuting)
    )


def _slot_name(irrep: Irrep, copy: int, column: int) -> str:
    if irrep.copies == 2:
        return f"{irrep.name}_{('left', 'right')[copy]}"
    if irrep.commuting == 2:
        return f"{irrep.name}_{('real', 'imag')[column]}"
    return irrep.name


def slab_size(group: Group, height: int, width: int) -> tuple[int, int]:
    """Size of the fundamental slab (its top-left part) of a height x width grid.

    ValueError for a grid that the group's elements do not map to itself.
    """
    turning = any(element.turns % 2 for element in group.elements)
    if turning and height != width:
        raise ValueError(f"group {group.name} needs a square, got {height} x {width}")
    for size, halved, what in (
        (height, group.halves[0], "rows"),
        (width, group.halves[1], "columns"),
    ):
        if halved and size % 2:
            raise ValueError(
                f"group {group.name} needs an even number of {what}, got {height} x {width}"
            )
    return (height // (1 + group.halves[0]), width // (1 + group.halves[1]))


def expansion(group: Group, height: int, width: int) -> Expansion:
    """Tables that spread slab filters over height x width; see `Expansion`."""
    slab = slab_size(group, height, width)
    cells = slab[0] * slab[1]
    moved = _moved_slabs(group, height, width, slab)  # [G pixels]
    terms = int((moved >= 0).sum(0).max())
    order = np.argsort(moved < 0, axis=0, kind="stable")[:terms]  # elements that reach a pixel
    cell = np.take_along_axis(moved, order, axis=0)
    columns = max(irrep.commuting for irrep in group.irreps)
    source, signs = [], []
    for number, irrep in enumerate(group.irreps):
        values = np.stack([irrep.matrices[g.name] for g in group.elements])  # [G d d]
        for i in range(irrep.dim):
            for copy in range(irrep.copies):
                first = slots(group).index(Slot(_slot_name(irrep, copy, 0), number, copy, 0))
                for k in range(terms):
                    for j in range(columns):
                        used = j < irrep.commuting
                        source.append(cell[k] + (first + used * j) * cells)
                        signs.append(used * values[order[k], i, j * used])
    shape = (group.order, terms * columns, height * width)
    tables = (
        np.moveaxis(np.array(table).reshape(shape), 1, 2).reshape(-1, shape[1])
        for table in (source, np.rint(signs).astype(np.int8))
    )
    return Expansion(Sums(*tables), slab)


def _moved_slabs(group: Group, height: int, width: int, slab: tuple[int, int]) -> np.ndarray:
    padded = np.full((height, width), -1)
    padded[: slab[0], : slab[1]] = np.arange(slab[0] * slab[1]).reshape(slab)
    return np.stack([element.on_array(padded).ravel() for element in group.elements])
