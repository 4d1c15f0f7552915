"""A net is judged on the splits that its probes read."""

from types import SimpleNamespace

import pytest

from evaluation.data import data_for, make_data
from utils.errors import UserError

NODE = {split: {"_target_": "torchvision.transforms.Grayscale"} for split in ("train", "val")}


@pytest.mark.parametrize("node", [{}, {"val": None}, {"val": {}}])
def test_a_split_that_is_not_given_is_named(node):
    """Whether it is absent or null, which leaves a split of a config out."""
    with pytest.raises(UserError, match=r"^data\.val is missing: a probe needs training and val"):
        make_data(node, "val")


def test_only_splits_that_a_probe_reads_are_built():
    """Both for a probe that does not say."""
    first, second = (SimpleNamespace(splits=(split,)) for split in ("train", "val"))
    assert list(data_for([first], {**NODE, "val": None})) == ["train"]
    assert list(data_for([first, second], NODE)) == ["train", "val"]
    assert list(data_for([SimpleNamespace()], NODE)) == ["train", "val"]
    assert data_for([], {}) == {}
