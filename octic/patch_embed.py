"""Lifting images to features and back: convolutions with symmetric filters on patches.

Only a filter's values on the fundamental slab (a quarter patch for D4) are trained; the group
spreads them over the patch. Letters: S slots, G components, C channels of a copy, p patch side.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octic.composed import is_composed
from octic.expansion import expansion, slab_size, slots
from octic.groups import Group, get_group
from octic.layers import OcticLinear, channels_per_copy
from octic.tables import Tables
from vit.backbone import check_counts, check_whole_patches
from vit.initialisation import init_convolution


class Unfold(Tables):
    """Spread slab values of every slot over a grid, symmetrically under the group.

    unfold(w)[component (irrep, i, copy)] = sum over g, j of rho(g)_ij (g moves w[irrep, copy, j]).
    """

    def __init__(self, height: int, width: int, *, scaled: bool, group: Group) -> None:
        super().__init__()
        spread, self.slab = expansion(group, height, width)
        self.height, self.width = height, width
        self.group, self.order, self.scaled = group, group.order, scaled
        cells = self.slab[0] * self.slab[1]
        gather = spread.transposed(len(slots(group)) * cells)
        arrays = {
            "index": spread.source,
            "signs": spread.signs,
            "back_index": gather.source,
            "back_signs": gather.signs,
        }
        if scaled:
            # Integers, so that no cast of the model rounds them; sqrt(dim / |G|) is taken at use.
            irreps = group.irreps
            dims = [irrep.dim for irrep in irreps for _ in range(irrep.dim * irrep.copies)]
            back_dims = [irreps[slot.irrep].dim for slot in slots(group)]
            arrays["dims"] = np.repeat(np.array(dims, dtype=np.int8), height * width)
            arrays["back_dims"] = np.repeat(np.array(back_dims, dtype=np.int8), cells)
        self.hold_tables(**arrays)

    def _tables_of(self, values: Tensor, *prefixes: str) -> list[Any]:
        """Index, signs and dimensions of each map named."""
        return [
            self.table(f"{prefix}{name}", values) if name != "dims" or self.scaled else None
            for prefix in prefixes
            for name in ("index", "signs", "dims")
        ]

    def _sums(self, values: Tensor, *prefixes: str) -> Tensor:
        """Values [A X h w] by the first map to rows [B X]; the second is its transpose."""
        rows = values.flatten(2).mT.flatten(0, 1)
        composed = is_composed() or not torch.is_grad_enabled()
        compute = _sums if composed else _Sums.apply
        return compute(rows, self.order, *self._tables_of(values, *prefixes))

    def forward(self, slabs: Tensor) -> Tensor:
        """Slab values [S X slab] to full values [G X H W]."""
        full = self._sums(slabs, "", "back_").unflatten(0, (self.order, -1))
        return full.mT.unflatten(-1, (self.height, self.width))

    def transpose(self, full: Tensor) -> Tensor:
        """The transpose of `forward`: full values [G X H W] to slab values [S X slab]."""
        slabs = self._sums(full, "back_", "").unflatten(0, (len(slots(self.group)), -1))
        return slabs.mT.unflatten(-1, self.slab)

    def cells(self, values: Tensor) -> Tensor:
        """Cell of the slab that each component, pixel and term reads [G H*W K]."""
        index = self.table("index", values) % (self.slab[0] * self.slab[1])
        return index.unflatten(0, (self.order, -1))

    def coefficient(self, values: Tensor) -> Tensor:
        """Factor of each component, pixel and term [G H*W K], in the dtype of `values`."""
        _, signs, dims = self._tables_of(values, "")
        return _factors(signs, dims, self.order, values.dtype).unflatten(0, (self.order, -1))

    def fold(self, full: Tensor) -> Tensor:
        """Slab values [S X slab] of a symmetric field [G X H W], those of least norm.

        unfold(fold(full)) = full. They are not unique where the slab holds several pixels of one
        orbit.
        """
        gathered = self.transpose(full)
        # On symmetric fields, unfolding after its transpose is a factor for each slot.
        again = self.transpose(self(gathered))
        square = gathered.square().sum((1, 2, 3), keepdim=True)
        factor = (again * gathered).sum((1, 2, 3), keepdim=True) / square
        return torch.where(square > 0, gathered / factor, gathered)


class _Sums(torch.autograd.Function):
    """Sums of chosen rows. Their gradient is a sum of chosen rows too, by the tables given last.

    Left to autograd it would add into rows by index, which sorts all indices on CUDA.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: int, *tables: Any) -> Tensor:
        ctx.order = order
        ctx.save_for_backward(*tables)
        return _sums(rows, order, *tables[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        tables = ctx.saved_tensors
        back = (grad, ctx.order, *tables[3:], *tables[:3])
        return (_Sums.apply if torch.is_grad_enabled() else _sums)(*back), *[None] * 7


def _sums(
    rows: Tensor, order: int, index: Tensor, signs: Tensor, dims: Tensor | None, *_: Tensor | None
) -> Tensor:
    """Rows [N X]: of `rows` those of `index` [N K], times their factors, summed over K."""
    chosen = rows.index_select(0, index.flatten()).unflatten(0, index.shape)
    return (chosen * _factors(signs, dims, order, rows.dtype).unsqueeze(-1)).sum(1)


def _factors(signs: Tensor, dims: Tensor | None, order: int, dtype: torch.dtype) -> Tensor:
    signs = signs.to(dtype)
    return signs if dims is None else signs * (dims.to(dtype) / order).sqrt().unsqueeze(-1)


class SlabConv(nn.Module):
    """The trained slab of one slot's filters: weight [C in slab], bias [C] on the trivial irrep."""

    def __init__(self, in_chans: int, out_chans: int, slab: tuple[int, int], bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_chans, in_chans, *slab))
        self.bias = nn.Parameter(torch.empty(out_chans)) if bias else None
        init_convolution(self.weight, self.bias)


class OcticLift(nn.Module):
    """Image to feature, as one convolution with all expanded filters.

    lift(g image) = g lift(image), where g also moves the patches. The parameters `conv_A1`, ...,
    `conv_E_right` hold the slabs (octic-vits, LiftD8).

    patch_size: side, or (height, width) for groups without quarter turns.
    scaled_bias: the bias takes the factor |G|^-1/2 of the filters too (Flopping for FLOPs).
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        patch_size: int | tuple[int, int],
        *,
        bias: bool = True,
        scaled_bias: bool = False,
        group: str | Group = "D4",
    ) -> None:
        super().__init__()
        self.group = get_group(group)
        self.patch_size = patch_size
        sides = _sides(patch_size)
        check_counts(1, in_chans=in_chans)
        _check_patch_size(sides, self.group)
        if 2 in sides and self.group.name == "D4":
            raise ValueError("patch_size 2 has no A2 and B1 filters under D4; use 4 or more")
        copy = channels_per_copy(embed_dim, self.group)
        self.embed_dim = embed_dim
        self.scaled_bias = scaled_bias
        self.unfold = Unfold(*sides, scaled=True, group=self.group)
        self.conv_names = [f"conv_{slot.name}" for slot in slots(self.group)]
        for index, name in enumerate(self.conv_names):
            conv = SlabConv(in_chans, copy, self.unfold.slab, bias and index == 0)
            self.add_module(name, conv)

    def filters(self) -> Tensor:
        """All full filters [D in p p], in the storage order."""
        convs = [self.get_submodule(name) for name in self.conv_names]
        slabs = torch.stack([conv.weight for conv in convs])  # [S C in slab]
        full = self.unfold(slabs.flatten(1, 2))  # [G C*in p p]
        return full.unflatten(1, slabs.shape[1:3]).flatten(0, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B in H W] to a grid of features [B D H/p W/p]."""
        bias = self.get_submodule(self.conv_names[0]).bias
        if bias is not None:
            if self.scaled_bias:
                bias = bias * math.sqrt(1 / self.group.order)
            bias = F.pad(bias, (0, self.embed_dim - len(bias)))
        return F.conv2d(images, self.filters(), bias, stride=self.patch_size)


class OcticPatchEmbed(nn.Module):
    """Lift of images to a grid of feature tokens."""

    def __init__(
        self,
        *,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        scaled_bias: bool = False,
        group: str | Group = "D4",
    ) -> None:
        super().__init__()
        self.group = get_group(group)
        self.patch_size = patch_size
        self.lift8 = OcticLift(
            in_chans, embed_dim, patch_size, bias=bias, scaled_bias=scaled_bias, group=self.group
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images [B in H W] to tokens on their grid [B H/p W/p D].

        ValueError for sides that are no multiples of the patch's: what is left over at the right
        and at the bottom would be cut off, which no moved image agrees with.
        """
        height, width = images.shape[-2:]
        check_whole_patches((height, width), self.patch_size)
        return self.lift8(images).permute(0, 2, 3, 1)


class OcticToPatch(nn.Module):
    """Feature tokens back to pixels: the transpose of a lift (octic-vits, IsotypicToPatchD8).

    to_patch(g x) = g to_patch(x). Of the E irrep the left copy is read.
    """

    def __init__(
        self,
        dim: int,
        patch_size: int,
        *,
        out_chans: int = 3,
        bias: bool = True,
        group: str | Group = "D4",
    ) -> None:
        super().__init__()
        self.group = get_group(group)
        check_counts(1, out_chans=out_chans)
        _check_patch_size(_sides(patch_size), self.group)
        self.patch_size, self.out_chans = patch_size, out_chans
        self.unfold = Unfold(patch_size, patch_size, scaled=True, group=self.group)
        cells = self.unfold.slab[0] * self.unfold.slab[1]
        width = self.group.order * cells * out_chans
        self.lin8 = OcticLinear(dim, width, bias=bias, group=self.group)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B N D] to patches [B N p*p*out], rows, then columns, then channels."""
        y = self.lin8(x).unflatten(-1, (self.group.order, -1, self.out_chans))  # [B N G cells out]
        cell, coefficient = self.unfold.cells(y), self.unfold.coefficient(y)
        terms = [
            coefficient[component, :, k, None] * y[:, :, component, cell[component, :, k]]
            for component in self._read_components()
            for k in range(coefficient.shape[-1])
        ]
        return math.sqrt(0.5) * torch.stack(terms).sum(0).flatten(2)

    def image(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B N D] of a h x w grid to images [B out h*p w*p]."""
        p = self.patch_size
        patches = self(x).unflatten(-1, (p, p, self.out_chans)).unflatten(1, grid)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _read_components(self) -> list[int]:
        components, start = [], 0
        for irrep in self.group.irreps:
            components += [start + row * irrep.copies for row in range(irrep.dim)]
            start += irrep.dim * irrep.copies
        return components


def _sides(patch_size: int | tuple[int, int]) -> tuple[int, int]:
    return (patch_size, patch_size) if isinstance(patch_size, int) else patch_size


def _check_patch_size(sides: tuple[int, int], group: Group) -> None:
    for side in sides:
        check_counts(1, patch_size=side)
    try:
        slab_size(group, *sides)
    except ValueError as error:
        raise ValueError(f"patch_size: {error} pixels") from None
