"""Arguments of stored cases become the reducer that the published code would build."""

from typing import Any

import pytest
import torch

from baselines.token_reduction.evit import EViT
from baselines.token_reduction.reducer import Facts
from tests.parity.token_reduction_case import build

FACTS = Facts(depth=4, first=0, num_prefix=1, has_class_token=True, head_dim=8)


def evit(method: str, **arguments: Any) -> EViT:
    found = build(method, arguments, FACTS.depth, {"image": torch.zeros(1)})
    assert isinstance(found, EViT)
    found.bind(FACTS)
    return found


@pytest.mark.parametrize("method", ["evit", "evit_upstream"])
def test_evit_counts_with_the_published_rounding(method):
    """0.28 of 25 tokens are 8 there; both scores of the stored cases were made by that code."""
    assert not evit(method, base_keep_rate=0.28, drop_loc=[1, -1]).exact_counts


@pytest.mark.parametrize("method", ["evit", "evit_upstream"])
def test_evit_overlooks_rates_behind_the_last_block(method):
    assert evit(method, keep_rate=[1, 0.7, 1, 0.5, 0.3, 0.2]).rates == {1: 0.7, 3: 0.5}
