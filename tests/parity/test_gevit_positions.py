"""The file's positions in the runners of `gevit`."""

import pytest
import torch

from baselines.gevit.attention import LiftingSelfAttention
from tests.parity.gevit_cases import places_of_pairs, take_positions

SIDE = 3


def layer_and_tables(window):
    side = {"window": SIDE} if window else {"map_size": SIDE}
    layer = LiftingSelfAttention("p8", 2, 4, 3, 2, **side)
    offsets = layer.neighbours.offsets
    places = ... if window else places_of_pairs(SIDE)
    shape = layer.neighbours.table_shape(8)
    rounded = {
        "row_indices": offsets.rows[:, places].float().double().view(shape),
        "col_indices": offsets.cols[:, places].float().double().view(shape),
    }
    return layer, rounded


@pytest.mark.parametrize("window", [True, False])
def test_a_layer_takes_the_rounded_positions_of_a_file(window):
    layer, tables = layer_and_tables(window)
    offsets = layer.neighbours.offsets
    expected = offsets.rows.float().double(), offsets.cols.float().double()
    assert not torch.equal(offsets.rows, expected[0])
    take_positions(tables, layer)
    assert torch.equal(offsets.rows, expected[0]) and torch.equal(offsets.cols, expected[1])


def test_other_positions_are_refused():
    layer, tables = layer_and_tables(window=True)
    tables["col_indices"] += 1e-5
    with pytest.raises(AssertionError, match="col_indices"):
        take_positions(tables, layer)
