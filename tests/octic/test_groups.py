"""Group tables are derived from generators; here they are proved."""

import numpy as np
import pytest
import torch

from octic.actions import act, act_on_tokens
from octic.groups import OCTIC_ELEMENTS, get_group, inverse, make_group, multiply
from octic.patch_embed import OcticPatchEmbed
from tests.octic.regular import from_regular, regular_action, to_regular

NAMES = ("mirror", "half_turn", "V4", "C4", "D4")
ORDERS = {"mirror": 2, "half_turn": 2, "V4": 4, "C4": 4, "D4": 8}


@pytest.mark.parametrize("name", NAMES)
def test_elements_form_a_group(name: str) -> None:
    """Closed under products and inverses, of the known order."""
    elements = get_group(name).elements
    assert len(elements) == ORDERS[name]
    assert {multiply(a, b) for a in elements for b in elements} == set(elements)
    assert {inverse(a) for a in elements} == set(elements)


def test_products_move_images_one_after_the_other() -> None:
    """(a b) image = a (b image)."""
    images = torch.randn(2, 3, 4, 4)
    for a in OCTIC_ELEMENTS:
        for b in OCTIC_ELEMENTS:
            both = a.on_images(b.on_images(images))
            assert torch.equal(multiply(a, b).on_images(images), both)


@pytest.mark.parametrize("name", NAMES)
def test_irreps_are_irreducible_homomorphisms_and_complete(name: str) -> None:
    """rho(ab) = rho(a) rho(b); characters are orthogonal; squares of dimensions fill the group."""
    group = get_group(name)
    for irrep in group.irreps:
        for a in group.elements:
            for b in group.elements:
                product = irrep.matrices[a.name] @ irrep.matrices[b.name]
                np.testing.assert_allclose(irrep.matrices[multiply(a, b).name], product, atol=1e-15)
        character = [np.trace(irrep.matrices[g.name]) for g in group.elements]
        assert np.dot(character, character) / group.order == irrep.commuting
    assert sum(irrep.dim * irrep.copies for irrep in group.irreps) == group.order


@pytest.mark.parametrize("name", NAMES)
def test_fourier_transform_intertwines(name: str) -> None:
    """F is orthogonal, and F^t rho(g) F permutes the regular components."""
    group = get_group(name)
    np.testing.assert_allclose(group.fourier @ group.fourier.T, np.eye(group.order), atol=1e-15)
    for element in group.elements:
        moved = group.fourier.T @ group.action(element) @ group.fourier
        np.testing.assert_allclose(moved, regular_action(element, group), atol=1e-15)
        permutation = regular_action(element, group)
        assert (permutation.sum(0) == 1).all() and (permutation.sum(1) == 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_regular_components_are_permuted_and_come_back(name: str) -> None:
    """to_regular(g x) = P(g) to_regular(x), and from_regular undoes it."""
    group = get_group(name)
    x = torch.randn(3, 2 * group.order, dtype=torch.float64)
    regular = to_regular(x, group)
    torch.testing.assert_close(from_regular(regular, group), x, rtol=1e-9, atol=1e-12)
    for element in group.elements:
        permutation = torch.tensor(regular_action(element, group))
        moved = (permutation @ regular.unflatten(-1, (group.order, -1))).flatten(-2)
        found = to_regular(act(x, element, group), group)
        torch.testing.assert_close(found, moved, rtol=1e-9, atol=1e-12)


def test_bad_groups_and_elements_are_refused() -> None:
    """Each error names what would be right."""
    with pytest.raises(ValueError, match="known: mirror, half_turn, V4, C4, D4"):
        get_group("D3")
    with pytest.raises(ValueError, match="published names say d2 for mirror, d8 for D4$"):
        get_group("D2")
    with pytest.raises(ValueError, match=r"unknown group \['D4'\]"):
        get_group(["D4"])
    with pytest.raises(ValueError, match="it has e, m"):
        get_group("mirror").element("r")
    with pytest.raises(ValueError, match="it has e, m"):
        act(torch.zeros(2), get_group("D4").element("r"), get_group("mirror"))


OWN = {"up_down": ("mrr",), "diagonal": ("mr",), "diagonals": ("rr", "mr")}


@pytest.mark.parametrize("name", OWN)
def test_a_group_of_ones_own_obeys_the_laws(name: str) -> None:
    """Irreps are homomorphisms, F is orthogonal; the lift obeys the law and reaches every pixel."""
    group = make_group(name, *OWN[name])
    assert group.order == 2 ** len(OWN[name])
    for a in group.elements:
        product = group.action(a) @ group.action(group.elements[-1])
        np.testing.assert_array_equal(group.action(multiply(a, group.elements[-1])), product)
    np.testing.assert_allclose(group.fourier @ group.fourier.T, np.eye(group.order), atol=1e-15)
    lift = OcticPatchEmbed(patch_size=4, embed_dim=4 * group.order, group=group).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    tokens = lift(images).flatten(1, 2)
    for element in group.elements:
        moved = lift(element.on_images(images)).flatten(1, 2)
        torch.testing.assert_close(moved, act_on_tokens(tokens, element, group, (2, 2)))
    assert (lift.lift8.filters()[:4].abs().sum((0, 1)) > 0).all()


def test_the_slab_is_as_small_as_a_rectangle_can_be() -> None:
    """Half of the rows and of the columns, where the group moves these to all cells."""
    halves = {"mirror": (0, 1), "half_turn": (0, 1), "V4": (1, 1), "C4": (1, 1), "D4": (1, 1)}
    assert {name: get_group(name).halves for name in halves} == halves
    own = {"up_down": (1, 0), "diagonal": (0, 0), "diagonals": (0, 1)}
    assert {name: make_group(name, *OWN[name]).halves for name in own} == own


def test_a_group_that_cannot_be_made_is_refused() -> None:
    """Each error names the group and what is wrong."""
    with pytest.raises(ValueError, match="group mine: no element 'd'; known: e, r, rr, rrr, m,"):
        make_group("mine", "d")
    with pytest.raises(ValueError, match="group mine holds quarter turns; .* named C4 and D4"):
        make_group("mine", "m", "mr")
    with pytest.raises(ValueError, match="m, rr, mrr make 4 elements, not 8; each generator"):
        make_group("mine", "m", "rr", "mrr")
    with pytest.raises(ValueError, match="no generators make 1 elements, not 2"):
        make_group("mine")
