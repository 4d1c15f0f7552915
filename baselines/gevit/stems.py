"""Stems, which make the map smaller before the attention: patches, or a G-CNN.

Letters in shapes: B images, C channels, D width, H W image, h w map, G elements, p side of a patch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from baselines.gevit.gcnn import GCNN
from baselines.gevit.groups import PlaneGroup
from octic.groups import OCTIC_ELEMENTS, Element, get_group
from utils.ranges import check_counts, check_flags
from vit.backbone import check_whole_patches

STEMS = ("none", "patch", "gcnn")


class PatchStem(nn.Module):
    """Non-overlapping patches, each averaged over symmetries, projected and normalised.

    Images [B C H W] to [B D h w]. The projection is linear, so patches are averaged before it
    (Departs from the published code, which projects every moved patch: same result, less work).
    For a symmetry T of those averaged over, the map of T x is T applied to the map of x.
    elements: the symmetries; without all of the group's the network after it is not equivariant.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        patch_size: int = 4,
        width: int = 64,
        elements: tuple[Element, ...] = OCTIC_ELEMENTS,
    ) -> None:
        super().__init__()
        check_counts(1, patch_size=patch_size, width=width)
        self.patch_size, self.num_channels, self.elements = patch_size, width, elements
        self.project = nn.Linear(in_channels * patch_size**2, width)
        self.layernorm = nn.LayerNorm(width)

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        """Size of the output map; ValueError for images that are not whole patches."""
        check_whole_patches((height, width), self.patch_size)
        return (height // self.patch_size, width // self.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Map [B D h w]."""
        height, width = self.map_size(*images.shape[-2:])
        size = self.patch_size
        patches = images.unflatten(-1, (width, size)).unflatten(-3, (height, size))
        patches = patches.permute(0, 2, 4, 1, 3, 5)  # [B h w C p p]
        mean = torch.stack([e.on_images(patches) for e in self.elements]).mean(dim=0)
        return self.layernorm(self.project(mean.flatten(-3))).permute(0, 3, 1, 2)


def patch_elements(rotations: int, mirrors: bool) -> tuple[Element, ...]:
    """Symmetries of a square patch: 1, 2 or 4 rotations, each mirrored too or not."""
    if rotations not in (1, 2, 4):
        raise ValueError(f"a square patch has 1, 2 or 4 rotations, not {rotations}")
    step = 4 // rotations
    return tuple(e for e in OCTIC_ELEMENTS if not e.turns % step and (mirrors or not e.flip))


def make_patch_stem(
    group: PlaneGroup,
    in_channels: int,
    *,
    patch_size: int = 4,
    width: int = 64,
    rotations: int | None = None,
    mirrors: bool | None = None,
) -> PatchStem:
    """Patches averaged over the group's symmetries of the square, or over more of them.

    ValueError where the group has symmetries that the patches are not averaged over.
    """
    if mirrors is not None:
        check_flags(mirrors=mirrors)
    own = group.grid_elements
    turns = rotations or sum(not element.flip for element in own)
    mirrored = group.mirrors if mirrors is None else mirrors
    elements = patch_elements(turns, mirrored)
    lacking = [element.name for element in own if element not in elements]
    if lacking:
        raise ValueError(
            f"patches averaged over {turns} rotations {'with' if mirrored else 'without'} "
            f"mirroring lack {', '.join(lacking)} of the group {group.name}; the network would not "
            "be equivariant"
        )
    return PatchStem(in_channels, patch_size=patch_size, width=width, elements=elements)


def grid_group(group: PlaneGroup) -> str:
    """The symmetry group of the pixel grid, by name, that a G-CNN in front of `group` needs."""
    own = set(group.grid_elements)
    for name in ("mirror", "half_turn", "C4", "V4", "D4"):
        if set(get_group(name).elements) == own:
            return name
    raise ValueError(f"a G-CNN stem before the group {group.name} would have no symmetry")


class AlignedGCNN(GCNN):
    """A G-CNN whose group axis is that of GE-ViT's attention, so that no lifting is needed.

    Element h of the convolution's left action is at R(h^-1) of the attention's right action:
    then f(g^-1 h) = f(h) R(g), and both laws are the same.
    """

    def __init__(self, plane: PlaneGroup, in_channels: int, **options: Any) -> None:
        if plane.order != len(plane.grid_elements):
            raise ValueError(
                f"a G-CNN has the symmetries of the pixel grid alone, {plane.name} has more; use "
                "p4, p4m or mz2, or let the stem pool its group"
            )
        super().__init__(in_channels, pool_group=False, group=grid_group(plane), **options)
        places = [plane.index_of(e) for e in self.group.elements]
        inverses = [plane.inverse(place) for place in places if place is not None]
        self._order = [inverses.index(place) for place in range(plane.order)]

    def forward(self, images: Tensor) -> Tensor:
        """Maps [B D G h w] in the attention's order of elements."""
        return super().forward(images)[:, :, self._order]
