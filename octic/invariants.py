"""Invariantizations: features [... D] to features that no group element changes.

x0 ... x7 are the octic components in the published order A1 A2 B1 B2 E11 E21 E12 E22, of C = D/8
channels each; the results stand side by side, C channels per polynomial.
Source: octic-vits, invariantization; polynomials of degree up to 4 in the real irreps of D4.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from octic.groups import Group, get_group
from octic.layers import OcticLayerNorm, channels_per_copy
from octic.tables import Tables

_QUADRATICS = (
    lambda x: x[6] ** 2 + x[7] ** 2,
    lambda x: x[4] * x[6] + x[5] * x[7],
    lambda x: x[4] ** 2 + x[5] ** 2,
)


class Invariantization(nn.Module):
    """Base: knows the group and the published order of the components."""

    output_dim: int

    def __init__(self, dim: int, *, group: str | Group = "D4") -> None:
        super().__init__()
        self.dim = dim
        self.group = get_group(group)
        self.copy = channels_per_copy(dim, self.group)
        self.published_order = self.group.published_order

    def components(self, x: Tensor) -> tuple[Tensor, ...]:
        """The |G| components [... C] in the published order."""
        parts = x.unflatten(-1, (self.group.order, -1)).unbind(-2)
        return tuple(parts[index] for index in self.published_order)


class _Octic(Invariantization):
    """One that is written for D4 alone."""

    def __init__(self, dim: int, *, group: str | Group = "D4") -> None:
        super().__init__(dim, group=group)
        if self.group.name != "D4":
            raise ValueError(f"{type(self).__name__} is defined for D4, not for {self.group.name}")


class NonInvariant(Invariantization):
    """|x| of every component: a control of equal cost that is not invariant."""

    def __init__(self, dim: int, *, group: str | Group = "D4") -> None:
        super().__init__(dim, group=group)
        self.output_dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Features [... D] to [... D]."""
        return torch.cat(self.components(x), dim=-1).abs()


class TrivialPart(Invariantization):
    """The trivial irrep as it is (the classifier's input in Flopping for FLOPs)."""

    def __init__(self, dim: int, *, group: str | Group = "D4") -> None:
        super().__init__(dim, group=group)
        self.output_dim = self.copy

    def forward(self, x: Tensor) -> Tensor:
        """Features [... D] to [... C]."""
        return x[..., : self.copy]


class LinearInvariant(Invariantization):
    """|x| of the trivial irrep."""

    def __init__(self, dim: int, *, group: str | Group = "D4") -> None:
        super().__init__(dim, group=group)
        self.output_dim = self.copy

    def forward(self, x: Tensor) -> Tensor:
        """Features [... D] to [... C]."""
        return x[..., : self.copy].abs()


class PowerSpectrum(Invariantization):
    """The trivial irrep as it is, |x| of the other lines, the length of each plane's vectors.

    Of the mirror group, [x+, |x-|]: Flopping for FLOPs, `use_symmetrized_asym_feats`.
    """

    def __init__(self, dim: int, *, group: str | Group = "D4") -> None:
        super().__init__(dim, group=group)
        self.output_dim = self.copy * sum(irrep.copies for irrep in self.group.irreps)

    def forward(self, x: Tensor) -> Tensor:
        """Features [... D] to [... sum of copies * C]."""
        trivial = self.copy
        start = self.group.num_lines * self.copy
        parts = [x[..., :trivial], x[..., trivial:start].abs()]
        for irrep in self.group.planes:
            width = irrep.dim * irrep.copies * self.copy
            rows = x[..., start : start + width].unflatten(-1, (irrep.dim, -1))
            # vector_norm has gradient 0 at 0, where a square root of squares has none.
            parts.append(torch.linalg.vector_norm(rows, dim=-2))
            start += width
        return torch.cat(parts, dim=-1)


class ThirdOrder(_Octic):
    """The 15 invariants of degree 3. They tell almost all orbits apart; of E alone all are 0."""

    def __init__(self, dim: int, *, group: str | Group = "D4") -> None:
        super().__init__(dim, group=group)
        self.output_dim = 15 * self.copy

    def forward(self, x: Tensor) -> Tensor:
        """Features [... D] to [... 15 C]."""
        c = self.components(x)
        x0, x1, x2, x3 = c[:4]
        quadratic = [core(c) for core in _QUADRATICS]
        low = [x0**3, *(x0 * q for q in quadratic), x0 * x3**2, x0 * x2**2, x0 * x1**2]
        return torch.cat([*low, *_mixed_cubics(c)], dim=-1)


class Polynomial(_Octic):
    """The 32 invariant polynomials of degree up to 4 (the published DeiT III invariant models)."""

    def __init__(self, dim: int, *, group: str | Group = "D4") -> None:
        super().__init__(dim, group=group)
        self.output_dim = 32 * self.copy

    def forward(self, x: Tensor) -> Tensor:
        """Features [... D] to [... 32 C]."""
        c = self.components(x)
        quadratic = [core(c) for core in _QUADRATICS]
        low = [c[0], *quadratic, c[3] ** 2, c[2] ** 2, c[1] ** 2]
        return torch.cat([*low, *_mixed_cubics(c), *_quartics(c)], dim=-1)


def _mixed_cubics(c: tuple[Tensor, ...]) -> list[Tensor]:
    _, x1, x2, x3, x4, x5, x6, x7 = c
    return [
        x3 * x6 * x7,
        x3 * (x5 * x6 + x4 * x7),
        x3 * x4 * x5,
        x2 * (x6**2 - x7**2),
        x2 * (x4 * x6 - x5 * x7),
        x2 * (x4**2 - x5**2),
        x1 * (x5 * x6 - x4 * x7),
        x1 * x2 * x3,
    ]


def _quartics(c: tuple[Tensor, ...]) -> list[Tensor]:
    _, x1, x2, x3, x4, x5, x6, x7 = c
    right = x6**2 - x7**2
    left = x4**2 - x5**2
    cross = x4 * x6 - x5 * x7
    return [
        x6**4 + x7**4,
        x4 * x6**3 + x5 * x7**3,
        x4**2 * x6**2 + x5**2 * x7**2,
        x4**3 * x6 + x5**3 * x7,
        x4**4 + x5**4,
        x2 * x3 * (x5 * x6 - x4 * x7),
        x1 * x3 * right,
        x1 * x3 * cross,
        x1 * x3 * left,
        x1 * x2 * x6 * x7,
        x1 * x2 * (x5 * x6 + x4 * x7),
        x1 * x2 * x4 * x5,
        x1 * x6 * x7 * right,
        x1 * (x5 * x6**3 - x4 * x7**3),
        x1 * x4 * x5 * right,
        x1 * x4 * x5 * cross,
        x1 * x4 * x5 * left,
    ]


class MaxFiltering(Invariantization, Tables):
    """The largest inner product of x with a moved reference, for each reference."""

    def __init__(
        self, dim: int, *, num_references: int | None = None, group: str | Group = "D4"
    ) -> None:
        super().__init__(dim, group=group)
        if num_references is not None and num_references < 1:
            raise ValueError(f"num_references must be 1 or more, not {num_references}")
        self.output_dim = 2 * dim if num_references is None else num_references
        self.hold_tables(actions=_actions(self.group))
        # [R C |G|], components in the published order
        self.references = nn.Parameter(torch.randn(self.output_dim, self.copy, self.group.order))
        with torch.no_grad():
            self.references.div_(self.references.norm(dim=(1, 2), keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        """Features [... D] to [... R]."""
        components = torch.stack(self.components(x), dim=-1)  # [... C G]
        actions = self.table("actions", x).to(x.dtype)
        # Move x instead of every reference: <ref, rho(g)^-1 x> runs over the same set.
        moved = torch.einsum("ghk,...ck->...gch", actions, components)
        return torch.einsum("rch,...gch->...gr", self.references, moved).amax(dim=-2)


class Canonization(Invariantization, Tables):
    """x moved by the element that brings it closest to a reference.

    The first maximum in the order e, r, rr, rrr, m, mr, mrr, mrrr wins; no gradient reaches the
    reference.
    """

    def __init__(self, dim: int, *, group: str | Group = "D4") -> None:
        super().__init__(dim, group=group)
        self.output_dim = dim
        self.hold_tables(actions=_actions(self.group))
        self.reference = nn.Parameter(torch.randn(dim))
        with torch.no_grad():
            self.reference.div_(self.reference.norm())

    def forward(self, x: Tensor) -> Tensor:
        """Features [... D] to [... D], components in the published order."""
        components = torch.stack(self.components(x), dim=-2)  # [... G C]
        actions = self.table("actions", x).to(x.dtype)
        moved = torch.einsum("ghk,...kc->...ghc", actions, components).flatten(-2)
        best = (moved @ self.reference).argmax(dim=-1)[..., None, None]
        # Not take_along_dim, for which torch.export would fix the number of images.
        return moved.gather(-2, best.expand(*moved.shape[:-2], 1, moved.shape[-1])).squeeze(-2)


def _actions(group: Group) -> np.ndarray:
    """The matrices [element G G] on components in the published order, all of them -1, 0 or 1."""
    order = list(group.published_order)
    matrices = [group.action(element)[order][:, order] for element in group.elements]
    return np.rint(matrices).astype(np.int8)


class InvariantHead(nn.Sequential):
    """Optional norm, then a two-layer classifier of invariant features (key names 0, 1, 3)."""

    def __init__(self, in_features: int, dim: int, num_classes: int, *, norm: bool = False) -> None:
        super().__init__(
            nn.LayerNorm(in_features, eps=1e-6) if norm else nn.Identity(),
            nn.Linear(in_features, dim),
            nn.GELU(),
            nn.Linear(dim, num_classes) if num_classes > 0 else nn.Identity(),
        )


INVARIANTIZATIONS: dict[str, type[Invariantization]] = {
    "power_spectrum": PowerSpectrum,
    "polynomial": Polynomial,
    "third_order": ThirdOrder,
    "linear": LinearInvariant,
    "trivial": TrivialPart,
    "max_filtering": MaxFiltering,
    "canonization": Canonization,
    "none": NonInvariant,
}


def make_invariantization(
    invariant: str | Callable[..., Invariantization], dim: int, group: str | Group = "D4"
) -> Invariantization:
    """Build one by its name, or by what builds one of dim and group."""
    if isinstance(invariant, str):
        if invariant not in INVARIANTIZATIONS:
            known = ", ".join(INVARIANTIZATIONS)
            raise ValueError(f"unknown invariantization {invariant!r}; known: {known}")
        return INVARIANTIZATIONS[invariant](dim, group=group)
    builds = callable(invariant) and not isinstance(invariant, nn.Module)
    made = invariant(dim, group=group) if builds else invariant
    if not builds or not isinstance(made, Invariantization):
        raise ValueError(
            "invariant must be a name or build an octic.invariants.Invariantization, called with "
            f"(dim, group=group); not {made!r}. In a config: a class with `_partial_: true`"
        )
    return made


def invariantizations_of_width(width: int, dim: int, group: str | Group = "D4") -> list[str]:
    """Names of those without parameters that make `width` channels of `dim`."""
    group, learned = get_group(group), (MaxFiltering, Canonization)
    names = [
        name
        for name, made in INVARIANTIZATIONS.items()
        if not issubclass(made, learned) and (group.name == "D4" or not issubclass(made, _Octic))
    ]
    return [n for n in names if make_invariantization(n, dim, group).output_dim == width]


def detect_invariantization(
    state: Mapping[str, Tensor], dim: int, *, group: str | Group = "D4", own: str = ""
) -> str | None:
    """The name of the invariantization that weights were trained with; None if there is no trace.

    Told by parameter names, else by the width of `invariant_proj`. Where several have that width it
    is `own`, if that is one of them.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}

    def find(ending: str) -> tuple[int, ...] | None:
        return next((shape for name, shape in shapes.items() if name.endswith(ending)), None)

    if find("invariantization.references"):
        return "max_filtering"
    if find("invariantization.reference"):
        return "canonization"
    projection = find("invariant_proj.weight")
    if projection is None or len(projection) != 2:
        return None
    found = invariantizations_of_width(projection[1], dim, group)
    return own if own in found else next(iter(found), None)


class InvariantNorm(OcticLayerNorm):
    """The norm over irreps, then an invariantization: f(g x) = f(x), [... D] to [... output_dim].

    What a classifier reads whose blocks are all equivariant.
    """

    def __init__(
        self,
        dim: int,
        *,
        invariant: str | Callable[..., Invariantization] = "trivial",
        eps: float = 1e-5,
        irrep_weights: Mapping[str, float] | None = None,
        group: str | Group = "D4",
    ) -> None:
        super().__init__(dim, eps=eps, irrep_weights=irrep_weights, group=group)
        self.invariantization = make_invariantization(invariant, dim, self.group)
        self.output_dim = self.invariantization.output_dim

    def forward(self, x: Tensor) -> Tensor:
        """Invariants of normalised features."""
        return self.invariantization(super().forward(x))
