"""The lift and its transpose: filters, biases, and what is refused."""

import pytest
import torch

from octic.expansion import slots
from octic.groups import get_group
from octic.patch_embed import OcticLift, OcticPatchEmbed, OcticToPatch

DIM = 32


def test_images_that_patches_do_not_fill_are_refused() -> None:
    """The rest would be cut off at the right and at the bottom, which breaks the symmetry."""
    embed = OcticPatchEmbed(patch_size=4, embed_dim=DIM)
    for height, width in ((10, 8), (8, 10)):
        with pytest.raises(
            ValueError, match=rf"{height} x {width} is not a multiple of .* 4; 8 x 8 and "
        ):
            embed(torch.randn(1, 3, height, width))
    embed = OcticPatchEmbed(patch_size=(2, 6), embed_dim=DIM, group="V4")
    assert embed(torch.randn(1, 3, 4, 12)).shape == (1, 2, 2, DIM)
    with pytest.raises(ValueError, match="not a multiple of the patch size 2 x 6; 6 x 6 is$"):
        embed(torch.randn(1, 3, 6, 4))


@pytest.mark.parametrize("group", ["mirror", "half_turn", "V4", "C4"])
def test_filters_have_the_norm_of_their_slabs(group: str) -> None:
    """Each component's that of its slots', where a slab holds one pixel of each orbit (not D4)."""
    symmetry = get_group(group)
    lift = OcticLift(3, 4 * symmetry.order, 4, group=symmetry).double()
    powers = lift.filters().square().sum((1, 2, 3)).unflatten(0, (symmetry.order, -1))
    component = 0
    for index, irrep in enumerate(symmetry.irreps):
        own = [slot for slot in slots(symmetry) if slot.irrep == index]
        slabs = [lift.get_submodule(f"conv_{slot.name}").weight for slot in own]
        expected = sum(slab.square().sum((1, 2, 3)) for slab in slabs)
        for _ in range(irrep.dim * irrep.copies):
            torch.testing.assert_close(powers[component], expected, rtol=1e-9, atol=1e-9)
            component += 1
    assert component == symmetry.order


@pytest.mark.parametrize("bias", [True, False])
def test_biases_are_of_the_trivial_irrep_and_can_be_left_out(bias: bool) -> None:
    """No other part of a feature may have one."""
    for net, name in (
        (OcticPatchEmbed(patch_size=4, embed_dim=DIM, bias=bias), "lift8.conv_A1.bias"),
        (OcticToPatch(DIM, 4, bias=bias), "lin8.lin_A1.bias"),
    ):
        assert [n for n, _ in net.named_parameters() if n.endswith("bias")] == [name] * bias


def test_patches_and_channels_that_are_none_are_refused() -> None:
    for size in (0, -4):
        for make in (OcticToPatch, lambda dim, size: OcticPatchEmbed(patch_size=size)):
            with pytest.raises(ValueError, match="patch_size must be a whole number of at least 1"):
                make(DIM, size)
    with pytest.raises(ValueError, match="patch_size: group D4 needs an even number of rows"):
        OcticToPatch(DIM, 7)
    with pytest.raises(ValueError, match="in_chans must be a whole number of at least 1, not 0"):
        OcticPatchEmbed(patch_size=4, in_chans=0)
    with pytest.raises(ValueError, match="out_chans must be a whole number of at least 1, not 0"):
        OcticToPatch(DIM, 4, out_chans=0)
