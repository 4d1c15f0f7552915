"""Equivariant layers over a symmetry group of the pixel grid; the octic group D4 by default.

Each maps features [... D] to features and satisfies layer(g x) = g layer(x) for every element g.
The storage is that of `octic.groups`; C = D / |G| is the number of channels of a copy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octic.device import takes_triton
from octic.groups import Group, get_group
from octic.irrep_linear import irrep_linear
from octic.irrep_norm import irrep_norm, residual_norm
from octic.layer_tensors import Matrices, Sources
from octic.matrices import stack_matrices
from octic.precision import autocast_dtype
from octic.regular_gelu import regular_gelu
from vit.block import has_hooks

Pair = Sequence[Matrices | None]  # of the two linear layers of attention or MLP


def channels_per_copy(dim: int, group: Group) -> int:
    """C = D / |G|, or an error that names the nearest width that works."""
    if dim < group.order or dim % group.order:
        nearest = max(1, round(dim / group.order)) * group.order
        raise ValueError(
            f"width {dim} is not a multiple of {group.order}, the order of the group "
            f"{group.name}; nearest: {nearest}"
        )
    return dim // group.order


class OcticLinear(nn.Module):
    """One matrix for each irrep, shared by its rows; a bias on the trivial irrep alone.

    Parameters in*out/8 and multiply-adds 3/16 of a dense layer's for D4 (octic-vits, LinearD8).
    All one-dimensional irreps are one batched product, the two-dimensional one another.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, group: str | Group = "D4"
    ) -> None:
        super().__init__()
        self.group = get_group(group)
        self.in_copy = channels_per_copy(in_features, self.group)
        self.out_copy = channels_per_copy(out_features, self.group)
        self.in_features, self.out_features = in_features, out_features
        self.num_lines, planes = self.group.num_lines, self.group.planes
        self.is_complex = bool(planes) and planes[0].commuting == 2
        self.layer_names = [f"lin_{irrep.name}" for irrep in self.group.irreps]
        for index, (name, irrep) in enumerate(
            zip(self.layer_names, self.group.irreps, strict=True)
        ):
            rows = irrep.copies * irrep.commuting * self.out_copy
            layer = nn.Linear(irrep.copies * self.in_copy, rows, bias=bias and index == 0)
            self.add_module(name, layer)

    def forward(
        self, x: Tensor, scale: nn.Module | None = None, matrices: Matrices | None = None
    ) -> Tensor:
        """Map [... in_features] to [... out_features]; `scale` is applied to the result.

        An `OcticScale` is multiplied into the matrices, which are smaller than the features: this
        saves a pass over the features and a tensor kept for the backward pass. matrices: those of
        this layer if `matrices_of` has made them already.
        """
        if scale is not None and not _fits_in_weights(scale, x):
            return scale(self(x, None, matrices))
        return irrep_linear(x, *self._matrices(x, scale, matrices))

    def without_bias(
        self, x: Tensor, scale: nn.Module | None = None, matrices: Matrices | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The product without the bias, and the bias, for the next operator to add.

        On a GPU the kernel that reads the product adds the bias on the way, which saves a pass over
        memory. The bias is detached: its gradient comes with that of the product. On other devices,
        and for a layer with hooks, the bias is in the product already, and None is returned.
        """
        folded = scale is None or _fits_in_weights(scale, x)
        if not takes_triton(x) or has_hooks(self) or not folded:
            return self(x, scale, matrices), None
        lines, plane, bias = self._matrices(x, scale, matrices)
        y = irrep_linear(x, lines, plane, bias, add_bias=False)
        return y, None if bias is None else bias.detach()

    def _matrices(self, x: Tensor, scale: nn.Module | None, matrices: Matrices | None) -> Matrices:
        # The product reads columns by strides, so it would not notice a wrong width.
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"features of {x.shape[-1]} channels given to an OcticLinear of {self.in_features}"
            )
        return matrices or matrices_of([(self, scale)], x)[0]

    def sources(self, scale: nn.Module | None = None) -> Sources:
        """The parameters of this layer's matrices, with those of the `scale` of its result."""
        layers = [getattr(self, name) for name in self.layer_names]
        weights, bias = [layer.weight for layer in layers], layers[0].bias
        factors = scale.factors() if isinstance(scale, OcticScale) else []
        if self.is_complex:
            weights[-1] = _complex_matrix(weights[-1])
            factors[-1:] = [factor.repeat(2) for factor in factors[-1:]]
        return Sources(weights, bias, factors, self.num_lines)

    def extra_repr(self) -> str:
        """Widths and group."""
        return f"{self.in_features}, {self.out_features}, group={self.group.name}"


def _fits_in_weights(scale: nn.Module, x: Tensor) -> bool:
    # In float16 a layer scale of 1e-5 times a weight would underflow.
    half = (autocast_dtype(x) or x.dtype) == torch.float16
    plain = isinstance(scale, OcticScale) and scale.beta is None and not half
    return plain and not has_hooks(scale)


def matrices_of(
    layers: Sequence[tuple[OcticLinear, nn.Module | None]], x: Tensor
) -> list[Matrices]:
    """The matrices of layers, each given with its result's scale, in the dtype of x's products."""
    sources = [
        layer.sources(scale if scale is not None and _fits_in_weights(scale, x) else None)
        for layer, scale in layers
    ]
    return stack_matrices(sources, dtype=autocast_dtype(x))


def _complex_matrix(parts: Tensor) -> Tensor:
    """Matrix [2C' 2C] on both rows of an irrep of complex type, from [2C' C].

    Its maps are W + V J, where J turns the rows by a quarter: (y0, y1) -> (-y1, y0).
    """
    real, turned = parts.chunk(2)
    return torch.cat([torch.cat([real, -turned], 1), torch.cat([turned, real], 1)])


class OcticScale(nn.Module):
    """A factor for each channel, shared by the rows of an irrep; optionally a shift of A1."""

    def __init__(
        self,
        dim: int,
        init_values: float = 1.0,
        *,
        bias: bool = False,
        group: str | Group = "D4",
    ) -> None:
        super().__init__()
        self.group = get_group(group)
        self.init_values = init_values
        copy = channels_per_copy(dim, self.group)
        self.factor_names = [f"alpha_{irrep.name}" for irrep in self.group.irreps]
        for name, irrep in zip(self.factor_names, self.group.irreps, strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(irrep.copies * copy)))
        self.beta = nn.Parameter(torch.empty(copy)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every factor to its initial value and the shift to zero."""
        for name, parameter in self.named_parameters():
            nn.init.constant_(parameter, 0.0 if name == "beta" else self.init_values)

    def factors(self) -> list[Tensor]:
        """The factors of a row of each irrep."""
        return [getattr(self, name) for name in self.factor_names]

    def forward(self, x: Tensor) -> Tensor:
        """Scale (and shift) features [... D]."""
        pairs = zip(self.factors(), self.group.irreps, strict=True)
        y = x * torch.cat([factor for factor, irrep in pairs for _ in range(irrep.dim)])
        if self.beta is not None:
            y = y + F.pad(self.beta, (0, x.shape[-1] - len(self.beta)))
        return y


class OcticLayerNorm(nn.Module):
    """Each irrep row loses its mean; all share one deviation; then a scale and a shift of A1.

    sigma^2 = (sum over irreps of weight * mean over rows of var(row) + eps) / |G|. The published
    weight of E is 1, not its natural 4, so that a unit-variance input leaves with variance 8/5;
    `irrep_weights={"E": 4}` is the natural norm (for C4, which has E once, 2). Statistics are
    float32 at least.

    Departs from octic-vits: statistics never in half precision, because bfloat16 ones cost a
    factor 2 in accuracy.
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
        irrep_weights: Mapping[str, float] | None = None,
        group: str | Group = "D4",
    ) -> None:
        super().__init__()
        self.group = get_group(group)
        channels_per_copy(dim, self.group)
        self.eps = eps
        self.segments = self.group.segments(irrep_weights or {})
        self.rows = [irrep.dim for irrep in self.group.irreps]  # rows that share a factor
        self.scaling = OcticScale(dim, bias=bias, group=self.group) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise features [... D]."""
        return irrep_norm(x, *self._affine(), **self._options(x))

    def after(
        self,
        x: Tensor,
        branch: Tensor,
        bias: Tensor | None = None,
        factors: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x + factors (branch + bias) and its norm, both [... D], in one pass.

        bias [C]: for the branch's first C channels; factors, that broadcast to [... 1]: without
        them 1.
        """
        options = {"bias": bias, "factors": factors} | self._options(x)
        return residual_norm(x, branch, *self._affine(), **options)

    def _affine(self) -> tuple[list[Tensor], Tensor | None]:
        if self.scaling is None:
            return [], None
        return self.scaling.factors(), self.scaling.beta

    def _options(self, x: Tensor) -> dict[str, Any]:
        # A matrix product follows, which autocast would cast: return its dtype at once.
        return {
            "segments": self.segments,
            "rows": self.rows,
            "eps": self.eps,
            "dtype": autocast_dtype(x),
        }


class OcticGELU(nn.Module):
    """GELU on the regular components: transform, exact GELU, transform back."""

    def __init__(self, *, group: str | Group = "D4") -> None:
        super().__init__()
        self.group = get_group(group)
        self.transform = tuple(map(tuple, self.group.fourier.tolist()))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Activate features [... D], a bias [C] added to the trivial irrep before."""
        return regular_gelu(x, self.transform, bias)


class OcticMlp(nn.Module):
    """Linear, GELU, (norm,) linear."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        bias: bool | tuple[bool, bool] = True,
        norm: bool = False,
        group: str | Group = "D4",
    ) -> None:
        super().__init__()
        hidden = in_features if hidden_features is None else hidden_features
        out = in_features if out_features is None else out_features
        biases = (bias, bias) if isinstance(bias, bool) else bias
        self.fc1 = OcticLinear(in_features, hidden, bias=biases[0], group=group)
        self.act = OcticGELU(group=group)
        self.norm = OcticLayerNorm(hidden, group=group) if norm else nn.Identity()
        self.fc2 = OcticLinear(hidden, out, bias=biases[1], group=group)

    def forward(
        self, x: Tensor, scale: nn.Module | None = None, matrices: Pair = (None, None)
    ) -> Tensor:
        """Map features [... in] to [... out]; `scale` is applied to the result.

        matrices: those of both layers, if they are made already.
        """
        return self.fc2(self._hidden(x, matrices[0]), scale, matrices[1])

    def without_bias(
        self, x: Tensor, scale: nn.Module | None, matrices: Pair
    ) -> tuple[Tensor, Tensor | None]:
        """The result and a bias that is still to be added (`OcticLinear.without_bias`)."""
        return self.fc2.without_bias(self._hidden(x, matrices[0]), scale, matrices[1])

    def layers(self, scale: nn.Module | None) -> list[tuple[OcticLinear, nn.Module | None]]:
        """The linear layers, each with the scale of its result."""
        return [(self.fc1, None), (self.fc2, scale)]

    def _hidden(self, x: Tensor, matrices: Matrices | None) -> Tensor:
        if has_hooks(self.act) or not isinstance(self.act, OcticGELU):
            return self.norm(self.act(self.fc1(x, None, matrices)))  # of features with their bias
        return self.norm(self.act(*self.fc1.without_bias(x, None, matrices)))
