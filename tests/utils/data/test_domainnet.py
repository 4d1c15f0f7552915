"""One domain of DomainNet: both layouts, the classes of train, and one line for what is wrong."""

import pytest
from PIL import Image

from utils.data.domainnet import domainnet
from utils.errors import UserError


@pytest.fixture
def root(tmp_path):
    for split, classes in (("train", "ab"), ("val", "b")):
        for name in classes:
            folder = tmp_path / "sketch" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(folder / "0.png")
    return tmp_path


def test_both_layouts(root):
    """Val lacks a class; its labels are train's nevertheless."""
    for folder in (root, root / "sketch"):
        val = domainnet(folder, domain="sketch", split="val", check_size=False)
        assert val.class_names == ["a", "b"] and val.labels.tolist() == [1]
    assert len(domainnet(root, domain="sketch", check_size=False)) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"domain": "sketsh"}, "did you mean 'sketch'"),
        ({"domain": "sketch", "split": "test"}, "there are train and val"),
        ({"domain": "real"}, "lacks train and val"),
        ({"domain": "sketch"}, "has 2 classes, DomainNet 345"),
    ],
)
def test_mistakes(root, options, said):
    with pytest.raises(UserError, match=said):
        domainnet(root, **options)
