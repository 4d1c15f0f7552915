"""Symmetry groups of the pixel grid, each derived from its generators and irreps.

An element is a number of quarter turns followed, or not, by a left-right mirroring. A group is
given by generators and by what each irreducible representation (irrep) does to them; everything
else (elements, tables, transforms, actions) follows.

A feature of C channels per copy is an ordinary tensor [... D], D = |G| C. Its channels are grouped
by irrep, an irrep's by row, a row's by copy:

    D4:  A1 | A2 | B1 | B2 | E row 0 (left copy, right copy) | E row 1 (left copy, right copy)

so that [... D] seen as [... |G| C] is acted on by matrices |G| x |G| alone.

Sources: Nordstrom et al. 2025, "Octic Vision Transformers"; Bokman et al. 2025, "Flopping for
FLOPs".
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Matrix = tuple[tuple[float, ...], ...]
Given = tuple[str, list[Matrix], Matrix, int]  # of an irrep: name, matrices, frames, commuting


class Element(NamedTuple):
    """Quarter turns (counter-clockwise), then a left-right mirroring or not."""

    turns: int
    flip: bool

    @property
    def name(self) -> str:
        """`e`, `r`, `rr`, `rrr`, `m`, `mr`, `mrr` or `mrrr`."""
        return ("m" if self.flip else "") + "r" * self.turns or "e"

    def matrix(self) -> np.ndarray:
        """Integer action on centred coordinates (right, up)."""
        turn = np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), self.turns)
        return np.diag([-1, 1]) @ turn if self.flip else turn

    def on_array(self, array: np.ndarray) -> np.ndarray:
        """Move the cells of a grid [H W]."""
        moved = np.rot90(array, self.turns)
        return moved[:, ::-1] if self.flip else moved

    def on_images(self, images: Tensor) -> Tensor:
        """Move the pixels of images [... H W]."""
        moved = torch.rot90(images, self.turns, dims=(-2, -1))
        return moved.flip(-1) if self.flip else moved


OCTIC_ELEMENTS = tuple(Element(turns, flip) for flip in (False, True) for turns in range(4))
_BY_MATRIX = {element.matrix().tobytes(): element for element in OCTIC_ELEMENTS}
_BY_NAME = {element.name: element for element in OCTIC_ELEMENTS}


def multiply(first: Element, second: Element) -> Element:
    """The element that applies `second`, then `first`."""
    return _BY_MATRIX[(first.matrix() @ second.matrix()).tobytes()]


def inverse(element: Element) -> Element:
    """The element that undoes this one."""
    return next(other for other in OCTIC_ELEMENTS if multiply(other, element).name == "e")


@dataclass(frozen=True)
class Irrep:
    """An irreducible representation and the place of its copies in the regular one.

    matrices: element name -> its real matrix [dim dim].
    frames: one unit vector for each copy inside the regular representation.
    commuting: dimension of the space of matrices that commute with all: 1 (real), 2 (complex type).
    """

    name: str
    dim: int
    matrices: dict[str, np.ndarray]
    frames: np.ndarray
    commuting: int

    @property
    def copies(self) -> int:
        """Times that it occurs in the regular representation."""
        return len(self.frames)


@dataclass(frozen=True, eq=False)
class Group:
    """A symmetry group of the pixel grid with its irreps, in the order of the storage."""

    name: str
    elements: tuple[Element, ...]
    irreps: tuple[Irrep, ...]
    halves: tuple[bool, bool]  # whether the slab is half the rows, half the columns

    @property
    def order(self) -> int:
        """Number of elements, and of components of a feature."""
        return len(self.elements)

    @property
    def num_lines(self) -> int:
        """Number of one-dimensional irreps; they come first in `irreps`."""
        return sum(irrep.dim == 1 for irrep in self.irreps)

    @property
    def planes(self) -> tuple[Irrep, ...]:
        """The two-dimensional irreps."""
        return self.irreps[self.num_lines :]

    def element(self, name: str) -> Element:
        """Look an element of the group up by its name."""
        for element in self.elements:
            if element.name == name:
                return element
        known = ", ".join(element.name for element in self.elements)
        raise ValueError(f"group {self.name} has no element {name!r}; it has {known}")

    def segments(self, irrep_weights: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
        """Runs of components that share one mean, as (copies, weight of its variance in the norm).

        irrep_weights: weight of an irrep's variance (mean over its rows), 1 by default. ValueError
        for an irrep that the group lacks and for weights that are not positive and finite.
        """
        known = [irrep.name for irrep in self.irreps]
        if unknown := ", ".join(sorted(set(irrep_weights) - set(known))):
            names = ", ".join(known)
            raise ValueError(f"irrep_weights: {self.name} has no irrep {unknown}; known: {names}")
        for name, value in irrep_weights.items():
            if not 0 < value < math.inf:
                raise ValueError(f"irrep_weights: the weight of {name} is {value}, not in (0, inf)")
        return tuple(
            (irrep.copies, irrep_weights.get(irrep.name, 1.0) / irrep.dim)
            for irrep in self.irreps
            for _ in range(irrep.dim)
        )

    @functools.cached_property
    def regular_elements(self) -> tuple[Element, ...]:
        """Elements in the published order of the regular components: r^k, then r^k after m."""
        turns = [element for element in self.elements if not element.flip]
        flips = [element for element in self.elements if element.flip]
        return (*turns, *(multiply(turn, flips[0]) for turn in turns if flips))

    @functools.cached_property
    def fourier(self) -> np.ndarray:
        """Orthogonal matrix [G G] from the regular representation to the irreps (storage order).

        Row (irrep, i, copy j), column g: sqrt(dim / |G|) * (rho(g^-1) u_j)_i.
        """
        rows = []
        for irrep in self.irreps:
            for i in range(irrep.dim):
                for frame in irrep.frames:
                    scale = math.sqrt(irrep.dim / self.order)
                    rows.append(
                        [
                            scale * (irrep.matrices[inverse(g).name] @ frame)[i]
                            for g in self.regular_elements
                        ]
                    )
        return np.array(rows)

    def action(self, element: Element) -> np.ndarray:
        """Matrix [G G] by which an element acts on the components of a feature.

        ValueError for an element of another group.
        """
        self.element(element.name)
        matrix = np.zeros((self.order, self.order))
        start = 0
        for irrep in self.irreps:
            size = irrep.dim * irrep.copies
            block = np.kron(irrep.matrices[element.name], np.eye(irrep.copies))
            matrix[start : start + size, start : start + size] = block
            start += size
        return matrix

    @functools.cached_property
    def published_order(self) -> tuple[int, ...]:
        """Storage index of each component in the published order: an irrep's copy by copy.

        The storage lists them row by row. That of D4 is A1 A2 B1 B2 E11 E21 E12 E22.
        """
        order, start = [], 0
        for irrep in self.irreps:
            for copy in range(irrep.copies):
                order += [start + row * irrep.copies + copy for row in range(irrep.dim)]
            start += irrep.dim * irrep.copies
        return tuple(order)


def _line(name: str, *signs: int) -> Given:
    return name, [((float(sign),),) for sign in signs], ((1.0,),), 1


_TURN: Matrix = ((0.0, -1.0), (1.0, 0.0))
_MIRROR: Matrix = ((-1.0, 0.0), (0.0, 1.0))
_HALF = math.sqrt(0.5)

# name -> generators, irreps with the matrix of each generator
_GROUPS: dict[str, tuple[tuple[str, ...], list[Given]]] = {
    "mirror": (("m",), [_line("A1", 1), _line("A2", -1)]),
    "half_turn": (("rr",), [_line("A", 1), _line("B", -1)]),
    "V4": (
        ("rr", "m"),
        [_line("A1", 1, 1), _line("A2", 1, -1), _line("B1", -1, 1), _line("B2", -1, -1)],
    ),
    "C4": (
        ("r",),
        [_line("A", 1), _line("B", -1), ("E", [_TURN], ((1.0, 0.0),), 2)],
    ),
    "D4": (
        ("r", "m"),
        [
            _line("A1", 1, 1),
            _line("A2", 1, -1),
            _line("B1", -1, 1),
            _line("B2", -1, -1),
            ("E", [_TURN, _MIRROR], ((_HALF, _HALF), (_HALF, -_HALF)), 1),
        ],
    ),
}
GROUP_NAMES = (*_GROUPS, "octic")


def get_group(name: str | Group = "D4") -> Group:
    """The group of that name: mirror, half_turn, V4, C4, D4 (also called octic), or as given."""
    if isinstance(name, Group):
        return name
    if name not in GROUP_NAMES:
        published = "published names say d2 for mirror, d8 for D4"
        raise ValueError(f"unknown group {name!r}; known: {', '.join(GROUP_NAMES)}; {published}")
    return _made("D4" if name == "octic" else name)


@functools.cache
def make_group(name: str, *generators: str) -> Group:
    """A group of one's own, by elements that generate it: make_group("up_down", "mrr").

    It has an irrep for each choice of their signs, A1 A2 B1 B2. ValueError for unknown elements,
    for one that the others make already, and for quarter turns (those groups are C4 and D4).
    """
    if unknown := [element for element in generators if element not in _BY_NAME]:
        known = ", ".join(_BY_NAME)
        raise ValueError(f"group {name}: no element {unknown[0]!r}; known: {known}")
    elements = _words(generators)
    if any(element.turns % 2 and not element.flip for element in elements):
        raise ValueError(f"group {name} holds quarter turns; these groups are named C4 and D4")
    wanted = 2 ** max(1, len(generators))
    if len(elements) != wanted:
        given = ", ".join(generators) or "no generators"
        raise ValueError(
            f"group {name}: {given} make {len(elements)} elements, not {wanted}; each generator "
            "must be one that the others do not make"
        )
    signs = itertools.product((1, -1), repeat=len(generators))
    lines = zip(("A1", "A2", "B1", "B2"), signs, strict=False)
    return _group(name, generators, [_line(irrep, *own) for irrep, own in lines])


@functools.cache
def _made(known: str) -> Group:
    return _group(known, *_GROUPS[known])


def _group(name: str, generators: tuple[str, ...], irreps: Sequence[Given]) -> Group:
    words = _words(generators)
    elements = tuple(element for element in OCTIC_ELEMENTS if element in words)
    made = tuple(_irrep(*data, generators, words) for data in irreps)
    return Group(name, elements, made, _halves(elements))


def _halves(elements: Sequence[Element]) -> tuple[bool, bool]:
    """Whether half the rows, half the columns of a grid are enough for all of it to be reached."""
    for rows, columns in ((True, True), (False, True), (True, False)):
        slab = np.zeros((2, 2), dtype=bool)
        slab[: 2 - rows, : 2 - columns] = True
        if np.any([element.on_array(slab) for element in elements], axis=0).all():
            return rows, columns
    return False, False


def _words(generators: tuple[str, ...]) -> dict[Element, tuple[str, ...]]:
    """Every element as a product of generators, found breadth first."""
    words: dict[Element, tuple[str, ...]] = {_BY_NAME["e"]: ()}
    frontier = [_BY_NAME["e"]]
    while frontier:
        grown = []
        for element in frontier:
            for generator in generators:
                product = multiply(_BY_NAME[generator], element)
                if product not in words:
                    words[product] = (generator, *words[element])
                    grown.append(product)
        frontier = grown
    return words


def _irrep(
    name: str,
    matrices: list[Matrix],
    frames: Matrix,
    commuting: int,
    generators: tuple[str, ...],
    words: dict[Element, tuple[str, ...]],
) -> Irrep:
    given = {key: np.array(value) for key, value in zip(generators, matrices, strict=True)}
    dim = len(matrices[0])
    products = {
        element.name: functools.reduce(np.matmul, [given[key] for key in word], np.eye(dim))
        for element, word in words.items()
    }
    return Irrep(name, dim, products, np.array(frames), commuting)
