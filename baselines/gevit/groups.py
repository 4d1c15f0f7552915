"""Rotations and mirrorings of the plane, SE2(n) and E2(n): elements, products, relation tables.

Element (k, m), k of nr rotations, m = 0 or 1, has the index m nr + k and acts on vectors (x right,
y down) by the matrix A = S^m Rot(2 pi k / nr), S = diag(-1, 1): rotate, then mirror left-right.

Every layer over such a group obeys y(T x)[g] = T y(x)[g R(T)] for the symmetries T of the pixel
grid that the group holds; R(T) is `PlaneGroup.index_of`, R(T1 T2) = R(T1) R(T2).

Source: Romero and Cordonnier 2021, "Group Equivariant Stand-Alone Self-Attention For Vision";
Xu et al. 2023, "E(2)-Equivariant Vision Transformer".
"""

import functools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from octic.groups import OCTIC_ELEMENTS, Element
from utils.ranges import check_word

TABLES = ("exact", "reference")
# Name -> rotations, mirrorings or not; as on the published command line.
GROUPS = {
    "z2": (1, False),
    "p4": (4, False),
    "p8": (8, False),
    "p12": (12, False),
    "p16": (16, False),
    "mz2": (1, True),
    "p4m": (4, True),
    "p8m": (8, True),
}


@dataclass(frozen=True)
class PlaneGroup:
    """SE2(n): n rotations. E2(n): n/2 rotations, each also mirrored."""

    rotations: int
    mirrors: bool

    def __post_init__(self) -> None:
        if self.rotations < 1:
            raise ValueError(f"a group has at least one rotation, not {self.rotations}")

    @property
    def order(self) -> int:
        """Number of elements."""
        return self.rotations * (1 + self.mirrors)

    @property
    def name(self) -> str:
        """The published name, or SE2(n) or E2(n) if there is none."""
        for name, facts in GROUPS.items():
            if facts == (self.rotations, self.mirrors):
                return name
        return f"{'E2' if self.mirrors else 'SE2'}({self.order})"

    def parts(self, index: int) -> tuple[int, int]:
        """Rotation k and mirroring m of an element."""
        return index % self.rotations, index // self.rotations

    def compose(self, first: int, second: int) -> int:
        """Index of the product: the element that applies `second`, then `first`."""
        (k1, m1), (k2, m2) = self.parts(first), self.parts(second)
        k = (-k1 if m2 else k1) + k2
        return (m1 ^ m2) * self.rotations + k % self.rotations

    def inverse(self, index: int) -> int:
        """Index of the inverse; a mirrored element is its own."""
        k, m = self.parts(index)
        return index if m else -k % self.rotations

    def index_of(self, element: Element) -> int | None:
        """R(T): index of the element by which a symmetry of the pixel grid moves the group axis.

        None for a symmetry that is not in the group.
        """
        if element.turns * self.rotations % 4 or (element.flip and not self.mirrors):
            return None
        turned = -element.turns * self.rotations // 4 % self.rotations
        return self.compose(self.rotations, turned) if element.flip else turned

    @functools.cached_property
    def grid_elements(self) -> tuple[Element, ...]:
        """The symmetries of the pixel grid in this group: its layers are exact under these."""
        return tuple(e for e in OCTIC_ELEMENTS if self.index_of(e) is not None)

    @property
    def needs_even(self) -> bool:
        """Whether halving an odd extent breaks a symmetry: any grid symmetry but the identity.

        >>> get_group("z2").needs_even
        False
        """
        return len(self.grid_elements) > 1

    def permutation(self, element: Element) -> list[int]:
        """For each g the index of g R(T): y(T x) = T y(x)[:, :, permutation]."""
        moved = self.index_of(element)
        if moved is None:
            raise ValueError(f"{element.name} is not in the group {self.name}")
        return [self.compose(g, moved) for g in range(self.order)]

    def elements(self) -> np.ndarray:
        """Angles [n 1], or angles and mirror signs [n 2] with mirrorings, as published."""
        angles = [[2 * math.pi * k / self.rotations] for k in range(self.rotations)]
        if not self.mirrors:
            return np.array(angles)
        return np.array([[*angle, sign] for sign in (1.0, -1.0) for angle in angles])

    def matrices(self) -> np.ndarray:
        """A of every element, float64 [n 2 2]; exact under the symmetries of the square.

        Cosines and sines are read off the first octant, so that the tables of positions of two
        elements that a symmetry of the pixel grid relates agree to the last bit.
        """
        found = []
        for index in range(self.order):
            k, m = self.parts(index)
            cos, sin = _cos_sin(Fraction(k, self.rotations))
            sign = -1.0 if m else 1.0
            found.append([[sign * cos, -sign * sin], [sin, cos]])
        return np.array(found)

    def relations(self, table: str = "exact") -> np.ndarray:
        """Index [v g m] of the relation of query g to key m, as output v sees it, int64.

        exact: (g m^-1)(g v^-1), which does not change when v, g and m are all multiplied from the
        right. reference: the published table, the same for rotations alone and for one mirroring,
        and not equivariant where a group holds both (Departs from GE-ViT: not the default).
        """
        check_word("group_table", table, TABLES)
        count = range(self.order)
        entry = self._exact if table == "exact" else self._published
        return np.array([[[entry(v, g, m) for m in count] for g in count] for v in count])

    def _exact(self, v: int, g: int, m: int) -> int:
        return self.compose(self.compose(g, self.inverse(m)), self.compose(g, self.inverse(v)))

    def _published(self, v: int, g: int, m: int) -> int:
        n = self.rotations
        if not self.mirrors:
            return (2 * g - m - v) % n
        if n == 1:
            return (m + v) % 2
        (vr, vm), (gr, gm), (mr, mm) = self.parts(v), self.parts(g), self.parts(m)
        a = gr + (-vr if gm else vr)
        return ((mm + gm + vm) % 2) * n + (mr - (-a if mm else a)) % n


class MapSymmetries(NamedTuple):
    """Interface of equivariance reports, for nets whose group-averaged maps turn with images."""

    elements: tuple[Element, ...]

    def action(self, element: Element) -> list[list[float]]:
        """How an element mixes channels: not at all."""
        return [[1.0]]


def get_group(name: "str | PlaneGroup" = "p4") -> PlaneGroup:
    """The group of a name: z2, p4, p8, p12, p16, mz2 (mirroring alone), p4m, p8m."""
    if isinstance(name, PlaneGroup):
        return name
    check_word("group", name, GROUPS)
    return PlaneGroup(*GROUPS[name])


def _cos_sin(turns: Fraction) -> tuple[float, float]:
    """Cosine and sine of a number of turns, with the symmetries of the square in every bit."""
    turns %= 1
    if turns > Fraction(1, 2):
        cos, sin = _cos_sin(1 - turns)
        return cos, -sin
    if turns > Fraction(1, 4):
        cos, sin = _cos_sin(Fraction(1, 2) - turns)
        return -cos, sin
    if turns > Fraction(1, 8):
        cos, sin = _cos_sin(Fraction(1, 4) - turns)
        return sin, cos
    if turns == Fraction(1, 8):
        return math.sqrt(0.5), math.sqrt(0.5)
    return math.cos(2 * math.pi * turns), math.sin(2 * math.pi * turns)
