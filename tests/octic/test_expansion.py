"""Tables of symmetric filters, and the map that they describe."""

import numpy as np
import pytest
import torch

from octic.expansion import expansion, slab_size, slots
from octic.groups import get_group
from octic.patch_embed import Unfold

NAMES = ("mirror", "half_turn", "V4", "C4", "D4")


@pytest.mark.parametrize("name", NAMES)
def test_expansion_reaches_every_pixel_and_uses_the_whole_slab(name: str) -> None:
    """The tables cover the whole square."""
    group = get_group(name)
    (index, signs), slab = expansion(group, 6, 6)
    cells = slab[0] * slab[1]
    assert index.shape == signs.shape and len(index) == group.order * 36
    assert (index >= 0).all() and (np.abs(signs).sum(1) > 0).all()
    assert set(np.unique(index % cells)) == set(range(cells))
    assert set(np.unique(index // cells)) == set(range(len(slots(group))))


def test_grids_that_a_group_does_not_keep_are_refused() -> None:
    """Each error names what would be right."""
    with pytest.raises(ValueError, match="even number"):
        slab_size(get_group("D4"), 5, 5)
    with pytest.raises(ValueError, match="needs a square"):
        slab_size(get_group("C4"), 4, 6)
    assert slab_size(get_group("mirror"), 5, 6) == (5, 3)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_the_transpose_however_often(name: str, scaled: bool) -> None:
    """Once and twice; nothing is added by index, which would sort on CUDA."""
    unfold = Unfold(4, 4, scaled=scaled, group=get_group(name))
    slabs = torch.randn(len(slots(unfold.group)), 2, *unfold.slab, dtype=torch.float64)
    slabs.requires_grad_()
    assert torch.autograd.gradcheck(unfold, slabs)
    assert torch.autograd.gradgradcheck(unfold, slabs)
    full = unfold(slabs)
    grad = torch.randn_like(full)
    expected = torch.func.vjp(unfold, slabs)[1](grad)[0]  # by PyTorch's own operators
    with torch.profiler.profile() as profile:
        (found,) = torch.autograd.grad(full, slabs, grad)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(unfold.transpose(grad), expected, rtol=1e-12, atol=1e-12)
    names = {event.key for event in profile.key_averages()}
    assert "aten::index_select" in names
    assert not any("index_put" in n or "index_add" in n or "scatter" in n for n in names)
