"""PCam from small folders of its layout, CIFAR with a validation set; faults are one line."""

import numpy as np
import pytest
from PIL import Image

from utils.data.cifar import held_out
from utils.data.images import ImageError
from utils.data.pcam import pcam
from utils.errors import UserError


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("valid", 2), ("test", 1)):
        for name in ("no_tumor", "tumor"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path


def test_splits(root):
    train, val, test = (pcam(root, split=split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (8, 4, 2)
    assert list(train.class_names) == ["no_tumor", "tumor"]
    assert train.labels.tolist() == [0] * 4 + [1] * 4
    assert val.read(3).size == (96, 96) and val.path(0).endswith("valid/no_tumor/0.png")


def test_a_fraction_takes_as_much_of_each_class(root):
    half = pcam(root, fraction=0.5)
    assert half.labels.tolist() == [0, 0, 1, 1] and half.path(3).endswith("train/tumor/2.png")
    for fraction in (0.0, 1.5):
        with pytest.raises(UserError, match=f"fraction is {fraction}"):
            pcam(root, fraction=fraction)


def test_what_is_wrong_is_one_line(root, tmp_path):
    with pytest.raises(UserError, match="holds 8 images, not the official 262,144"):
        pcam(root, check_size=True)
    with pytest.raises(UserError, match="no split 'valid'; there are train, val, test"):
        pcam(root, split="valid")
    (root / "train" / "tumor" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ImageError, match=r"tumor/0\.png"):
        pcam(root).read(4)
    (root / "test" / "tumor" / "0.png").unlink()
    with pytest.raises(UserError, match=r"test/tumor holds no image"):
        pcam(root, split="test")
    (root / "test" / "tumor").rmdir()
    with pytest.raises(UserError, match=r"test lacks tumor; PCam is read from ROOT/train"):
        pcam(root, split="test")
    (root / "train" / "other").mkdir()
    (root / "valid" / "tumor" / "0.png").rename(root / "train" / "other" / "0.png")
    with pytest.raises(UserError, match="other is not one of the 2 known classes"):
        pcam(root)
    with pytest.raises(UserError, match="does not exist"):
        pcam(tmp_path / "nowhere")


def test_cifar_held_out(tmp_path):
    """The last training images are val; train and val share none, and the test set is apart."""
    for batch in range(1, 6):
        data = bytes([batch]) + bytes(3072) + bytes([0]) + bytes(3072)
        (tmp_path / f"data_batch_{batch}.bin").write_bytes(data)
    (tmp_path / "test_batch.bin").write_bytes(bytes([7]) + bytes(3072))
    (tmp_path / "batches.meta.txt").write_text("\n".join("abcdefghij"))
    parts = {s: held_out(tmp_path, split=s, num_val=3) for s in ("train", "val", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 7, "val": 3, "test": 1}
    assert parts["val"].labels.tolist() == [0, 5, 0] and parts["test"].labels.tolist() == [7]
    with pytest.raises(UserError, match="num_val is 10, of 10 training images"):
        held_out(tmp_path, num_val=10)
    with pytest.raises(UserError, match="no split 'x' of CIFAR held out"):
        held_out(tmp_path, split="x")
