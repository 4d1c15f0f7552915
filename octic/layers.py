"""Equivariant layers over a symmetry group of the pixel grid; the octic group D4 by default.

Each maps features [... D] to features and satisfies layer(g x) = g layer(x) for every element g.
The storage is that of `octic.groups`; C = D / |G| is the number of channels of a copy.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octic.groups import Group, get_group
from octic.kernels import irrep_norm, regular_gelu
from vit.attention import attend, check_backend, check_heads
from vit.packing import Packing


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
        for index, irrep in enumerate(self.group.irreps):
            rows = irrep.copies * irrep.commuting * self.out_copy
            layer = nn.Linear(irrep.copies * self.in_copy, rows, bias=bias and index == 0)
            self.add_module(f"lin_{irrep.name}", layer)

    def forward(self, x: Tensor) -> Tensor:
        """Map [... in_features] to [... out_features]."""
        lines = self.group.num_lines
        flat = x.reshape(-1, self.in_features)
        out = [self._map_lines(flat[:, : lines * self.in_copy])]
        start = lines * self.in_copy
        for irrep in self.group.planes:
            width = irrep.dim * irrep.copies * self.in_copy
            rows = flat[:, start : start + width].unflatten(-1, (irrep.dim, -1))
            weight = self.get_submodule(f"lin_{irrep.name}").weight
            out.append(self._map_rows(rows, weight, irrep.commuting))
            start += width
        return torch.cat(out, dim=-1).view(*x.shape[:-1], self.out_features)

    def _map_lines(self, x: Tensor) -> Tensor:
        names = [irrep.name for irrep in self.group.irreps[: self.group.num_lines]]
        layers = [self.get_submodule(f"lin_{name}") for name in names]
        weight = torch.stack([layer.weight for layer in layers])  # [lines C_out C_in]
        x = x.unflatten(-1, (len(layers), self.in_copy)).transpose(0, 1)  # [lines M C_in]
        bias = layers[0].bias
        if bias is None:
            y = torch.bmm(x, weight.transpose(1, 2))
        else:
            bias = F.pad(bias[None, None], (0, 0, 0, 0, 0, len(layers) - 1))
            y = torch.baddbmm(bias, x, weight.transpose(1, 2))
        return y.transpose(0, 1).flatten(1)

    @staticmethod
    def _map_rows(rows: Tensor, weight: Tensor, commuting: int) -> Tensor:
        y = F.linear(rows, weight)  # [M 2 copies*C_out], twice that for a complex type
        if commuting == 2:
            real, turned = y.chunk(2, dim=-1)
            # The second commuting matrix is the quarter turn: (y0, y1) -> (-y1, y0).
            y = real + torch.stack([-turned[:, 1], turned[:, 0]], dim=1)
        return y.flatten(1)

    def extra_repr(self) -> str:
        """Widths and group."""
        return f"{self.in_features}, {self.out_features}, group={self.group.name}"


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
        for irrep in self.group.irreps:
            alpha = nn.Parameter(torch.empty(irrep.copies * copy))
            self.register_parameter(f"alpha_{irrep.name}", alpha)
        self.beta = nn.Parameter(torch.empty(copy)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every factor to its initial value and the shift to zero."""
        for name, parameter in self.named_parameters():
            nn.init.constant_(parameter, 0.0 if name == "beta" else self.init_values)

    def vector(self) -> Tensor:
        """The factors of all D channels."""
        return torch.cat(
            [
                self.get_parameter(f"alpha_{irrep.name}")
                for irrep in self.group.irreps
                for _ in range(irrep.dim)
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scale (and shift) features [... D]."""
        y = x * self.vector()
        if self.beta is not None:
            y = y + F.pad(self.beta, (0, x.shape[-1] - len(self.beta)))
        return y


class OcticLayerNorm(nn.Module):
    """Each irrep row loses its mean; all share one deviation; then a scale and a shift of A1.

    sigma^2 = (sum over irreps of weight * mean over rows of var(row) + eps) / |G|. The published
    weight of E is 1, not its natural 4, so that a unit-variance input leaves with variance 8/5;
    `irrep_weights={"E": 4}` is the natural norm. Statistics are float32 at least.

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
        self.scaling = OcticScale(dim, bias=bias, group=self.group) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise features [... D]."""
        scale = shift = None
        if self.scaling is not None:
            scale, shift = self.scaling.vector(), self.scaling.beta
        return irrep_norm(x, scale, shift, segments=self.segments, eps=self.eps)


class OcticGELU(nn.Module):
    """GELU on the regular components: transform, exact GELU, transform back."""

    def __init__(self, *, group: str | Group = "D4") -> None:
        super().__init__()
        self.group = get_group(group)
        self.transform = tuple(map(tuple, self.group.fourier.tolist()))

    def forward(self, x: Tensor) -> Tensor:
        """Activate features [... D]."""
        return regular_gelu(x, self.transform)


class OcticMlp(nn.Module):
    """Linear, GELU, (norm,) linear."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        bias: bool = True,
        norm: bool = False,
        group: str | Group = "D4",
    ) -> None:
        super().__init__()
        hidden = hidden_features or in_features
        self.fc1 = OcticLinear(in_features, hidden, bias=bias, group=group)
        self.act = OcticGELU(group=group)
        self.norm = OcticLayerNorm(hidden, group=group) if norm else nn.Identity()
        self.fc2 = OcticLinear(hidden, out_features or in_features, bias=bias, group=group)

    def forward(self, x: Tensor) -> Tensor:
        """Map features [... in] to [... out]."""
        return self.fc2(self.norm(self.act(self.fc1(x))))


class OcticAttention(nn.Module):
    """Softmax attention whose heads each hold a part of every irrep.

    Logits are inner products of features, so they are invariant; each head is a feature of width
    D / H, which needs C to be a multiple of the number of heads.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        backend: str = "auto",
        group: str | Group = "D4",
    ) -> None:
        super().__init__()
        self.group = get_group(group)
        check_heads(channels_per_copy(dim, self.group), num_heads)
        check_backend(backend)
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.backend = backend
        self.qkv = OcticLinear(dim, 3 * dim, bias=qkv_bias, group=self.group)
        self.proj = OcticLinear(dim, dim, bias=proj_bias, group=self.group)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """Attend within each sequence; x and the result are features [B T D]."""
        q, k, v = self._split_heads(self.qkv(x), 3).unbind(2)
        dropout = self.attn_drop if self.training else 0.0
        out = attend(q, k, v, packing, backend=self.backend, dropout=dropout)
        return self.proj(self._join_heads(out))

    def _pieces(self) -> list[tuple[int, int]]:
        """(rows, copies) of the parts of the storage that split into heads alike."""
        lines = [(self.group.num_lines, 1)]
        return lines + [(irrep.dim, irrep.copies) for irrep in self.group.planes]

    def _split_heads(self, x: Tensor, parts: int) -> Tensor:
        """Features [B T parts*D] to heads [B T parts H D/H]."""
        copy = x.shape[-1] // self.group.order
        pieces, start = [], 0
        for rows, copies in self._pieces():
            width = rows * copies * copy
            piece = x[..., start : start + width].unflatten(-1, (rows, parts, self.num_heads, -1))
            pieces.append(piece.permute(0, 1, 3, 4, 2, 5).flatten(-2))
            start += width
        return torch.cat(pieces, dim=-1)

    def _join_heads(self, x: Tensor) -> Tensor:
        """Heads [B T H D/H] to features [B T D]."""
        copy = x.shape[-1] // self.group.order
        pieces, start = [], 0
        for rows, copies in self._pieces():
            width = rows * copies * copy
            piece = x[..., start : start + width].unflatten(-1, (rows, -1))
            pieces.append(piece.transpose(2, 3).flatten(2))
            start += width
        return torch.cat(pieces, dim=-1)
