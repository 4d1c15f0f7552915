"""Rotated MNIST from small files of its own format, and one line for everything that is wrong."""

import hashlib
import os
import zipfile

import numpy as np
import pytest
import torch

from utils.data import rotmnist
from utils.data.rotmnist import ARCHIVE, FILES, RotMnist
from utils.errors import UserError

SIZES = {"num_train": 3, "num_val": 2, "num_test": 4}


def rows(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 784)), rng.integers(0, 10, count)


def text(pixels: np.ndarray, labels: np.ndarray) -> str:
    """Numbers in columns and the label as a float, as the published files have them."""
    lines = [
        "   ".join(f"{value / 256:.7e}" for value in row) + f"   {label:.7e} \n"
        for row, label in zip(pixels, labels, strict=True)
    ]
    return "".join("   " + line for line in lines)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / FILES["train"]).write_text(text(*rows(5, 0)))
    (tmp_path / FILES["test"]).write_text(text(*rows(4, 1)))
    return tmp_path


def test_splits_and_pixels(folder):
    """First train, then val, out of one file; the second reading takes the bytes kept beside it."""
    pixels, labels = rows(5, 0)
    for _ in range(2):
        train, val, test = (RotMnist(folder, split=s, **SIZES) for s in ("train", "val", "test"))
        assert (len(train), len(val), len(test)) == (3, 2, 4)
        assert [*train.labels, *val.labels] == list(labels)
        image = val.read(1)
        assert (image.mode, image.size) == ("RGB", (28, 28))
        assert (np.asarray(image)[..., 1] == pixels[4].reshape(28, 28)).all()
        assert test.label(2) == rows(4, 1)[1][2] and test.path(2).endswith("test 2")
        for name in set(FILES.values()):
            assert (folder / f"{name}.uint8.npy").is_file()
    assert len(train.class_names) == 10 and "3 images" in repr(train)


def test_a_fraction_is_of_the_training_images_and_the_published_one(folder):
    """The first of a permutation by seed 0, in its order; validation and test stay whole."""
    _, labels = rows(5, 0)
    torch.manual_seed(0)
    expected = labels[torch.randperm(3)[:2].numpy()]
    assert list(RotMnist(folder, fraction=0.7, **SIZES).labels) == list(expected)
    assert len(RotMnist(folder, split="val", fraction=0.7, **SIZES)) == 2
    with pytest.raises(UserError, match="fraction is 0"):
        RotMnist(folder, fraction=0, **SIZES)


def test_bytes_of_another_file_are_not_taken(folder):
    RotMnist(folder, **SIZES)
    kept = folder / f"{FILES['train']}.uint8.npy"
    kept.write_bytes(b"nonsense")
    assert len(RotMnist(folder, **SIZES)) == 3
    with pytest.raises(UserError, match="has 5 rows, not 12,000: is it cut short"):
        RotMnist(folder)
    source, later = folder / FILES["train"], kept.stat().st_mtime + 1
    source.write_text(text(*rows(5, 2)))
    os.utime(source, (later, later))
    assert list(RotMnist(folder, **SIZES).labels) == list(rows(5, 2)[1][:3])


def test_the_archive_is_read_in_place_after_its_checksum(folder, tmp_path, monkeypatch):
    packed = tmp_path / "packed"
    packed.mkdir()
    with zipfile.ZipFile(packed / ARCHIVE, "w") as archive:
        archive.write(folder / FILES["train"], FILES["train"])
    with pytest.raises(UserError, match="its md5 is not 0f9a947f"):
        RotMnist(packed, **SIZES)
    md5 = hashlib.md5((packed / ARCHIVE).read_bytes()).hexdigest()
    monkeypatch.setattr(rotmnist, "MD5", md5)
    assert (RotMnist(packed, **SIZES).labels == RotMnist(folder, **SIZES).labels).all()
    with pytest.raises(UserError, match=r"cannot read mnist_all.*test.amat in"):
        RotMnist(packed, split="test", **SIZES)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t[: len(t) // 2], r"row 3: \d+ numbers, not 785"),
        (lambda t: t[: t.rindex("\n", 0, -1) + 1], "has 4 rows, not 5: is it cut short"),
        (lambda t: t + t, "more than the 5 rows"),
        (lambda t: t.replace("e-01", "e-x1", 1), "row 1: holds more than numbers"),
        (lambda t: t.replace("e-01", "e+01", 1), r"row 1: pixels must lie in \[0, 1\]"),
        (lambda t: "\x00binary\xff" + t, "row 1: holds more than numbers"),
    ],
    ids=["cut in a row", "cut after a row", "twice", "no number", "too large", "binary"],
)
def test_damaged_files_are_one_line(folder, change, said):
    path = folder / FILES["train"]
    path.write_text(change(path.read_text()), encoding="latin-1")
    with pytest.raises(UserError, match=said) as error:
        RotMnist(folder, **SIZES)
    assert "\n" not in str(error.value) and path.name in str(error.value)


def test_what_is_missing_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"holds neither mnist_all.* nor mnist_rotation_new.zip"):
        RotMnist(tmp_path)
    with pytest.raises(UserError, match="no split 'all'; there are train, val, test"):
        RotMnist(tmp_path, split="all")
    with pytest.raises(UserError, match="data.root=FOLDER"):
        RotMnist(None)
