"""Group axioms, the law behind the tables, and exact positions."""

import numpy as np
import pytest

from baselines.gevit.groups import GROUPS, PlaneGroup, get_group
from baselines.gevit.positions import local_offsets, turned
from octic.groups import OCTIC_ELEMENTS, inverse, multiply

named = pytest.mark.parametrize("name", GROUPS)


@named
def test_products_are_those_of_the_matrices(name):
    group = get_group(name)
    matrices = group.matrices()
    for a in range(group.order):
        assert group.compose(a, group.inverse(a)) == group.compose(group.inverse(a), a) == 0
        for b in range(group.order):
            product = matrices[a] @ matrices[b]
            np.testing.assert_allclose(matrices[group.compose(a, b)], product, atol=1e-15)


@named
def test_index_of_is_a_homomorphism(name):
    """R(T1 T2) = R(T1) R(T2), the identity stands at 0."""
    group = get_group(name)
    assert group.index_of(OCTIC_ELEMENTS[0]) == 0
    for first in group.grid_elements:
        for second in group.grid_elements:
            both = group.compose(group.index_of(first), group.index_of(second))
            assert group.index_of(multiply(first, second)) == both


@named
def test_the_exact_table_is_invariant_and_the_published_one_where_it_may_be(name):
    """Multiplying v, g and m from the right leaves relations alone; all are reached."""
    group = get_group(name)
    exact, published = group.relations(), group.relations("reference")
    broken = False
    for moved in range(group.order):
        to = [group.compose(a, moved) for a in range(group.order)]
        assert (exact[np.ix_(to, to, to)] == exact).all()
        broken |= (published[np.ix_(to, to, to)] != published).any()
    assert set(exact.ravel()) == set(range(group.order))
    mixed = group.mirrors and group.rotations > 1
    assert broken == mixed
    assert (exact == published).all() == (not mixed)


@named
@pytest.mark.parametrize("size", [3, 5, 9])
def test_tables_of_related_elements_agree_in_every_bit(name, size):
    """u_g(T d) = u_(g R(T))(d): a turned window is a permuted table, without rounding."""
    group = get_group(name)
    tables = turned(local_offsets(size), group)
    cells = np.arange(size * size).reshape(size, size)
    for element in group.grid_elements:
        moved = inverse(element).on_array(cells).ravel()
        to = [group.compose(g, group.index_of(element)) for g in range(group.order)]
        for table in tables:
            assert (table[:, moved] == table[to]).all()


def test_unknown_words_are_one_line():
    with pytest.raises(ValueError, match="group must be one of z2, p4, "):
        get_group("p5")
    with pytest.raises(ValueError, match="group_table must be one of exact, reference"):
        get_group("p4").relations("old")
    with pytest.raises(ValueError, match="at least one rotation"):
        PlaneGroup(0, mirrors=False)
    with pytest.raises(ValueError, match="m is not in the group p4"):
        get_group("p4").permutation(OCTIC_ELEMENTS[4])
    assert PlaneGroup(3, mirrors=True).name == "E2(6)"
