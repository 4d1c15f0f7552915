"""An ImageNet tree reads alike with and without metadata; its faults are said in one line."""

import gzip
import io
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.data.imagenet import ImageNetTree, main, write_extra
from utils.data.imagenet22k import ImageNet22k
from utils.data.images import ImageError
from utils.data.strings import parse_dataset, split_string
from utils.errors import UserError

FILES = (
    "train/n01/n01_10.JPEG",
    "train/n01/n01_9.JPEG",
    "train/n02/n02_3.JPEG",
    "val/n01/ILSVRC2012_val_00000002.JPEG",
    "val/n02/ILSVRC2012_val_00000001.JPEG",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in FILES:
        path = tmp_path / "imagenet" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4)).save(path, "JPEG")
    return tmp_path / "imagenet"


def _facts(images: ImageNetTree) -> tuple:
    count = range(len(images))
    paths, labels = [images.path(i) for i in count], [images.label(i) for i in count]
    return paths, labels, images.class_names, images.class_ids


@pytest.mark.parametrize("with_names", [True, False])
@pytest.mark.parametrize("split", ["train", "val"])
def test_with_and_without_metadata(
    root: Path, tmp_path: Path, split: str, with_names: bool
) -> None:
    if with_names:
        (root / "labels.txt").write_text('n02,"fish, gold"\nn01,tench\nn03,a name nobody uses\n')
    write_extra(root, tmp_path / "extra")
    plain = ImageNetTree(root, split=split)
    indexed = ImageNetTree(root, split=split, extra=tmp_path / "extra")
    assert _facts(plain) == _facts(indexed)
    assert indexed.class_names == (["tench", "fish, gold"] if with_names else ["n01", "n02"])
    assert indexed.labels.dtype == plain.labels.dtype == np.int64
    assert indexed.read(0).size == (5, 4)


def test_absent_metadata_are_said_and_done_without(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        images = ImageNetTree(root, extra=tmp_path)
    assert len(images) == 3
    assert "python -m utils.data.imagenet ROOT EXTRA" in caplog.text


def test_val_takes_its_class_numbers_from_train(root: Path) -> None:
    (root / "val/n01/ILSVRC2012_val_00000002.JPEG").unlink()
    (root / "val/n01").rmdir()
    assert ImageNetTree(root, split="val").labels.tolist() == [1]


def test_the_test_split_is_flat_and_unlabelled(root: Path, tmp_path: Path) -> None:
    (root / "test").mkdir()
    Image.new("RGB", (5, 4)).save(root / "test/ILSVRC2012_test_00000007.JPEG", "JPEG")
    images = ImageNetTree(root, split="test")
    assert (len(images), images.labels, images.label(0), images.read(0).size) == (
        1,
        None,
        None,
        (5, 4),
    )
    written = write_extra(root, tmp_path / "extra")
    assert len(written) == 7
    assert (
        len(ImageNetTree(root, split="test", extra=tmp_path / "extra", check_size=True)) == 100_000
    )


def test_sizes_are_checked_when_asked(root: Path) -> None:
    with pytest.raises(UserError, match=r"3 images\): the official split train has 1,281,167"):
        ImageNetTree(root, check_size=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"root": None}, "IMAGENET_PATH"),
        ({"root": "nowhere"}, "does not exist"),
        ({"split": "train2"}, "there are train, val, test"),
        ({"split": "test"}, "test does not exist"),
    ],
)
def test_wrong_arguments_are_one_clear_line(root: Path, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImageNetTree(**{"root": root, **arguments})


def test_flat_val_is_explained(root: Path) -> None:
    (root / "flat" / "val").mkdir(parents=True)
    Image.new("RGB", (5, 4)).save(root / "flat/val/ILSVRC2012_val_00000001.JPEG", "JPEG")
    with pytest.raises(UserError, match="no class folders"):
        ImageNetTree(root / "flat", split="val")


def test_metadata_are_refused_for_other_names(root: Path, tmp_path: Path) -> None:
    Image.new("RGB", (5, 4)).save(root / "train/n02/cat.png")
    with pytest.raises(UserError, match=r"cat\.png is not named as ImageNet"):
        write_extra(root, tmp_path / "extra", splits=["train"])
    assert len(ImageNetTree(root)) == 4


def test_wrong_labels_and_metadata_files_are_named(root: Path, tmp_path: Path) -> None:
    (root / "labels.txt").write_text("n01,tench\nn02,fish,gold\n")
    with pytest.raises(UserError, match="row 2: 3 columns"):
        ImageNetTree(root)
    (root / "labels.txt").write_bytes(b"n01,\xff\xfe")
    with pytest.raises(UserError, match=r"cannot read .*labels.txt, text in UTF-8"):
        ImageNetTree(root)
    (root / "labels.txt").unlink()
    write_extra(root, tmp_path)
    np.save(tmp_path / "class-names-TRAIN.npy", np.array(["tench"]))
    with pytest.raises(UserError, match="contradict one another: 2 class ids, 1 names, labels up"):
        ImageNetTree(root, extra=tmp_path)
    np.save(tmp_path / "class-ids-TRAIN.npy", np.array(["n01"]))
    with pytest.raises(UserError, match="contradict one another: 1 class ids, .* labels up to 1"):
        ImageNetTree(root, extra=tmp_path)
    (tmp_path / "entries-TRAIN.npy").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot read the metadata file"):
        ImageNetTree(root, extra=tmp_path)
    np.save(tmp_path / "entries-TRAIN.npy", np.arange(3))
    with pytest.raises(UserError, match="is no list of images"):
        ImageNetTree(root, extra=tmp_path)


def test_metadata_that_cannot_agree_are_warned_of(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "val/n03").mkdir()
    write_extra(root, tmp_path / "extra", splits=["val"])
    assert "other class folders than train" in caplog.text


def test_the_command_writes_them(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = [sys.executable, "-m", "utils.data.imagenet", str(root), str(tmp_path / "extra")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == len(list((tmp_path / "extra").iterdir())) == 6
    (tmp_path / "file").touch()
    for words, code, said in (
        ([], 2, "error: the following arguments are required: ROOT, EXTRA; usage: python -m"),
        (["--help"], 0, ""),
        ([str(tmp_path / "nowhere"), str(tmp_path)], 2, "error: the folder of images"),
        ([str(root), str(tmp_path / "file")], 2, "error: EXTRA: cannot make"),
        ([str(root), str(tmp_path / "file" / "extra")], 2, "error: EXTRA: cannot make"),
    ):
        with pytest.raises(SystemExit) as left:
            main(words)
        told = capsys.readouterr().err
        assert left.value.code == code and told.startswith(said)
        assert told.count("\n") == (code != 0)


def test_data_set_strings_build(root: Path, tmp_path: Path) -> None:
    write_extra(root, tmp_path / "extra")
    images = parse_dataset(f"ImageNet:split=VAL:root={root}:extra={tmp_path / 'extra'}")
    assert (images.split, len(images)) == ("val", 2)
    assert len(parse_dataset(f"ImageNet:root={root}:split=TRAIN")) == 3
    next((root / "val").rglob("*.JPEG")).unlink()
    without = parse_dataset(f"ImageNet:split=VAL:root={root}")
    assert len(without) == 1, "extra lists the images as they were"
    assert len(parse_dataset(f"ImageNet:split=VAL:root={root}:extra={tmp_path / 'extra'}")) == 2


@pytest.mark.parametrize(
    ("string", "message"),
    [
        ("ImageNet:root=/a", "lacks split"),
        ("ImageNet:split=TRAIN", "lacks root"),
        ("ImageNet22k:root=/a", "lacks extra"),
        ("imagenet:root=/a", "unknown data set 'imagenet'; known: ImageNet, ImageNet22k"),
        ("ImageNet:split=train:root=/a", "unknown split 'train'; known: TRAIN, VAL, TEST"),
        ("ImageNet:split=TRAIN:root=/a=b", "'root=/a=b' is not key=value"),
        ("ImageNet:split=TRAIN:root", "'root' is not key=value"),
        ("ImageNet:root=/a:root=/b", "root is given twice"),
        ("ImageNet22k:split=TRAIN:root=/a", "unknown key 'split'"),
        ("", "unknown data set ''"),
    ],
)
def test_wrong_data_set_strings_are_explained(string: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_dataset(string)


def test_strings_keep_their_values() -> None:
    assert split_string("ImageNet22k:extra=b:root=") == ("ImageNet22k", {"extra": "b", "root": ""})
    # Parsed as in DINOv2, though nothing is built of them.
    assert split_string("ImageNet22k:split=x") == ("ImageNet22k", {"split": "x"})
    assert split_string("ImageNet:root=a:root=b") == ("ImageNet", {"root": "b"})


def test_names_are_kept_whole_whatever_rows_labels_txt_has(root: Path, tmp_path: Path) -> None:
    """Fields are as wide as the published ones, of the first rows, and as what must go in."""
    for rows, width in (
        ("n00,a\nn01,bb\nn02,a long name\n", 11),
        ("n00,a long name\nn01,b\nn02,c\n", 11),
    ):
        (root / "labels.txt").write_text(rows)
        write_extra(root, tmp_path, splits=["train"])
        entries = np.load(tmp_path / "entries-TRAIN.npy")
        assert entries.dtype["class_name"] == f"<U{width}"
        names = dict(line.split(",") for line in rows.splitlines())
        assert [names[row["class_id"]] for row in entries] == entries["class_name"].tolist()


def test_imagenet22k_reads_compressed_members_and_names_damaged_ones(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4)).save(buffer, "JPEG")
    packed = gzip.compress(buffer.getvalue())
    block = bytes(512) + packed + bytes(-len(packed) % 512)
    damaged = bytearray(block)
    damaged[540] ^= 255
    (tmp_path / "n01.tar").write_bytes(block + damaged)
    kinds = [("class_index", "<u4"), ("class_id", "<U3"), ("start_offset", "<u4")]
    kinds += [("end_offset", "<u4"), ("filename", "<U5")]
    size = len(block)
    rows = [(0, "n01", 0, size, "a.jpg"), (0, "n01", size, 2 * size, "b.jpg")]
    np.save(tmp_path / "entries.npy", np.array([*rows, (1, "n02", 0, 9, "c.jpg")], dtype=kinds))
    np.save(tmp_path / "class-ids.npy", np.array(["n01", "n02"]))
    images = ImageNet22k(tmp_path, extra=tmp_path)
    assert (len(images), images.read(0).size, images.label(2)) == (3, (5, 4), 1)
    for index, message in ((1, r"n01\.tar:b\.jpg: "), (2, r"n02\.tar:c\.jpg: No such file")):
        with pytest.raises(ImageError, match=message):
            images.read(index)
    (tmp_path / "n02.tar").touch()
    with pytest.raises(ImageError, match=r"n02\.tar:c\.jpg: cannot mmap an empty file"):
        images.read(2)


def test_imagenet22k_refuses_an_index_without_fields(tmp_path: Path) -> None:
    np.save(tmp_path / "entries.npy", np.arange(3))
    np.save(tmp_path / "class-ids.npy", np.array(["n01"]))
    with pytest.raises(UserError, match="cannot read the index of ImageNet-22k"):
        ImageNet22k(tmp_path, extra=tmp_path)


def test_imagenet22k_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the index of ImageNet-22k"):
        ImageNet22k(tmp_path, extra=tmp_path)
