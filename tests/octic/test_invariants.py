"""An invariantization of one's own, which a model takes in the place of a name."""

from functools import partial

import pytest
import torch
from torch import Tensor

from octic import OcticVisionTransformer
from octic.groups import Group
from octic.invariants import Invariantization, Polynomial

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}


class Orbit(Invariantization):
    """The length over all components: any width, here that of the polynomials."""

    def __init__(self, dim: int, *, repeats: int = 32, group: str | Group = "D4") -> None:
        super().__init__(dim, group=group)
        self.output_dim = repeats * self.copy

    def forward(self, x: Tensor) -> Tensor:
        """Features [... D] to [... repeats * C]."""
        lengths = x.unflatten(-1, (self.group.order, -1)).norm(dim=-2)
        return torch.cat([lengths] * (self.output_dim // self.copy), dim=-1)


def test_one_of_ones_own_is_built_and_invariant() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    for place, group in (("switch", "D4"), ("head", "D4"), ("switch", "C4")):
        net = OcticVisionTransformer(
            **SMALL, invariant=partial(Orbit, repeats=3), invariant_at=place, group=group
        ).eval()
        assert net.invariant
        torch.testing.assert_close(net(x.rot90(1, (2, 3))), net(x), rtol=1e-4, atol=1e-5)


def test_weights_do_not_change_it_though_their_width_is_that_of_a_name() -> None:
    own = OcticVisionTransformer(**SMALL, invariant=Orbit)
    for state in (own.state_dict(), OcticVisionTransformer(**SMALL, invariant=True).state_dict()):
        own.adapt_to(state)
        assert isinstance(own.invariantization, Orbit)
    named = OcticVisionTransformer(**SMALL, invariant=True)
    named.adapt_to(own.state_dict())
    assert isinstance(named.invariantization, Polynomial)


@pytest.mark.parametrize("wrong", [Orbit(64), torch.nn.Identity, 3])
def test_what_builds_none_is_refused(wrong: object) -> None:
    """A layer that is already built, one of another kind, and what is neither."""
    with pytest.raises((ValueError, TypeError), match="invariant must be a name or build"):
        OcticVisionTransformer(**SMALL, invariant=wrong)
