"""Lifting images to features and back: convolutions with symmetric filters on patches.

Only a filter's values on the fundamental slab (a quarter patch for D4) are trained; the group
spreads them over the patch. Letters: S slots, G components, C channels of a copy, p patch side.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octic.groups import Group, get_group
from octic.layers import OcticLinear, channels_per_copy
from vit.backbone import check_counts
from vit.initialisation import init_convolution


class Unfold(nn.Module):
    """Spread slab values of every slot over a grid, symmetrically under the group.

    unfold(w)[component (irrep, i, copy)] = sum over g, j of rho(g)_ij (g moves w[irrep, copy, j]).
    """

    dims: Tensor | None
    signs: Tensor
    slot: Tensor
    pixel: Tensor

    def __init__(self, height: int, width: int, *, scaled: bool, group: Group) -> None:
        super().__init__()
        self.height, self.width, self.slab = height, width, group.expansion(height, width).slab
        self.group, self.order, self.scaled = group, group.order, scaled
        for name, table in self._tables().items():
            self.register_buffer(name, table, persistent=False)

    def _tables(self) -> dict[str, Tensor | None]:
        # Integers, so that no cast of the model rounds them; sqrt(dim / |G|) is taken at use.
        tables = self.group.expansion(self.height, self.width)
        dims = torch.tensor(self.group.component_dims, dtype=torch.int8)
        return {
            "dims": dims if self.scaled else None,
            "signs": torch.tensor(tables.coefficient).flatten(2).to(torch.int8),
            "slot": torch.tensor(tables.slot),
            "pixel": torch.tensor(tables.pixel).flatten(1),
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Unfold":
        # Refill the tables after every move. A net built on `meta` gets empty tensors (`to_empty`),
        # and a file of weights holds no tables; `module.type(dtype)` would cast them too.
        super()._apply(fn, recurse)
        with torch.device("cpu"):
            tables = self._tables()
        for name, buffer in list(self.named_buffers()):
            if not buffer.is_meta and (table := tables[name]) is not None:
                setattr(self, name, table.to(buffer.device))
        return self

    def coefficient(self, values: Tensor) -> Tensor:
        """Factor of each component, term and pixel [G K H*W], in the dtype of `values`."""
        if self.slot.is_meta and not values.is_meta:  # weights were loaded with assign=True
            self._apply(lambda tensor: torch.empty_like(tensor, device=values.device))
        if self.dims is None:
            return self.signs.to(values.dtype)
        scale = (self.dims.to(values.dtype) / self.order).sqrt()
        return self.signs.to(values.dtype) * scale[:, None, None]

    def forward(self, slabs: Tensor) -> Tensor:
        """Slab values [S X slab] to full values [G X H W]."""
        coefficient = self.coefficient(slabs)
        slabs = slabs.flatten(2)
        terms = [
            coefficient[:, k, None] * slabs[self.slot[:, k]][..., self.pixel[k]]  # [G X H*W]
            for k in range(self.pixel.shape[0])
        ]
        return torch.stack(terms).sum(0).unflatten(-1, (self.height, self.width))

    def fold(self, full: Tensor) -> Tensor:
        """Slab values [S X slab] of a symmetric field [G X H W], those of least norm.

        unfold(fold(full)) = full. They are not unique where the slab holds several pixels of one
        orbit.
        """
        zeros = full.new_zeros(int(self.slot.max()) + 1, full.shape[1], *self.slab)
        transpose = torch.func.vjp(self.forward, zeros)[1]
        (gathered,) = transpose(full)
        # On symmetric fields, unfolding after its transpose is a factor for each slot.
        (again,) = transpose(self.forward(gathered))
        square = gathered.square().sum((1, 2, 3), keepdim=True)
        factor = (again * gathered).sum((1, 2, 3), keepdim=True) / square
        return torch.where(square > 0, gathered / factor, gathered)


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
        for index, slot in enumerate(self.group.slots):
            conv = SlabConv(in_chans, copy, self.unfold.slab, bias and index == 0)
            self.add_module(f"conv_{slot.name}", conv)

    def filters(self) -> Tensor:
        """All full filters [D in p p], in the storage order."""
        convs = [self.get_submodule(f"conv_{slot.name}") for slot in self.group.slots]
        slabs = torch.stack([conv.weight for conv in convs])  # [S C in slab]
        full = self.unfold(slabs.flatten(1, 2))  # [G C*in p p]
        return full.unflatten(1, slabs.shape[1:3]).flatten(0, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B in H W] to a grid of features [B D H/p W/p]."""
        bias = self.get_submodule(f"conv_{self.group.slots[0].name}").bias
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
        (height, width), (rows, columns) = images.shape[-2:], _sides(self.patch_size)
        if height % rows or width % columns:
            raise ValueError(
                f"image size {(height, width)} is not a multiple of the patch size "
                f"{self.patch_size}"
            )
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
        coefficient = self.unfold.coefficient(y)
        terms = [
            coefficient[component, k, :, None] * y[:, :, component, self.unfold.pixel[k]]
            for component in self._read_components()
            for k in range(coefficient.shape[1])
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
        group.slab(*sides)
    except ValueError as error:
        raise ValueError(f"patch_size: {error} pixels") from None
