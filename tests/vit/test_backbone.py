"""How blocks are asked for by their number."""

import pytest

from vit.backbone import take_indices


def test_indices() -> None:
    """Lists, counts, negatives; what is out of range is refused."""
    assert take_indices(2, 4) == [2, 3]
    assert take_indices([0, -1], 4) == [0, 3]
    with pytest.raises(ValueError, match="blocks 0 to 3"):
        take_indices([4], 4)


def test_more_blocks_than_there_are_are_refused():
    """Not taken twice; as many as there are, are all of them."""
    assert take_indices(4, 4) == take_indices(None, 4) == [0, 1, 2, 3]
    for count in (0, -1, 5, 8, 9):
        with pytest.raises(ValueError, match=f"blocks {count} asked of a network with blocks 0 to"):
            take_indices(count, 4)
