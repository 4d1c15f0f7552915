"""Tar shards give the folder back, whoever wrote them; what is wrong with them is one line."""

import io
import logging
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.data import shard_index
from utils.data.classes import class_fingerprint, class_list
from utils.data.images import ImageError, ImageFolder
from utils.data.loaders import evaluation_batches, training_batches
from utils.data.shard_files import expand
from utils.data.shard_writer import write_splits
from utils.data.shards import TarShards, shards
from utils.data.strings import parse_dataset
from utils.data.transforms import evaluation_transform, training_transform
from utils.errors import UserError


def png(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def make(path: Path, members: dict[str, bytes]) -> Path:
    """A shard of these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """train and val with the classes a, b and an empty c; 11 and 3 images of noise."""
    noise = np.random.default_rng(0).integers(0, 255, (14, 24, 20, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        path = tmp_path / "tree" / ("val" if number > 10 else "train") / "ab"[number % 2]
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path / f"{number}.{('png', 'JPEG')[number % 3 > 0]}")
    (tmp_path / "tree" / "train" / "c").mkdir()
    return tmp_path / "tree"


@pytest.fixture
def written(tree: Path, tmp_path: Path) -> Path:
    write_splits(tree, output=tmp_path / "out", shard_mb=0.012)
    return tmp_path / "out"


def test_shards_are_the_folder(tree: Path, written: Path) -> None:
    """Bytes, labels, classes and their fingerprint, image by image, though shards are shuffled."""
    for split in ("train", "val"):
        ours = parse_dataset(f"Shards:split={split.upper()}:root={written}")
        theirs = ImageFolder(tree / split, classes=["a", "b", "c"])
        assert ours.labels.tolist() == theirs.labels.tolist() and ours.labels.dtype == np.int64
        for index in range(len(theirs)):
            assert ours.read_bytes(index) == theirs.read_bytes(index)
            stem = Path(theirs.path(index)).relative_to(tree / split).with_suffix("")
            assert ours.path(index).split(":")[1].startswith(f"{stem}.")
        same = class_fingerprint(class_list(ours)) == class_fingerprint(class_list(theirs))
        assert same and len(ours) == len(theirs)
    assert len(expand(written / "train-*.tar")) > 1


def test_a_run_on_shards_is_the_run_on_the_folder(tree: Path, written: Path) -> None:
    """Number for number, and from the middle on."""
    transform = training_transform(crop_size=16)

    def batches(dataset, first_step):
        def collate(samples, generator):
            return torch.stack([s[0] for s in samples]), [s[1] for s in samples]

        stream = training_batches(dataset, transform, collate, 4, first_step=first_step, seed=1)
        return [next(stream) for _ in range(4 - first_step)]

    folder, ours = ImageFolder(tree / "train"), shards(written)
    for first in (0, 2):
        expected = batches(folder, 0)[first:]
        for (images, labels), (others, other_labels) in zip(
            batches(ours, first), expected, strict=True
        ):
            assert torch.equal(images, others) and labels == other_labels


def test_workers_share_open_shards(written: Path) -> None:
    """Forked after shards were opened, at different places of the same files."""
    images = shards(written)
    alone = [images.read(index).tobytes() for index in range(len(images))]
    transform = evaluation_transform(resize_size=8, crop_size=8)
    expected = torch.stack([transform(images.read(index)) for index in range(len(images))])
    found = list(evaluation_batches(images, transform, 3, num_workers=2))
    assert torch.equal(torch.cat([batch for batch, *_ in found]), expected)
    copy = pickle.loads(pickle.dumps(images))
    assert [copy.read(index).tobytes() for index in range(len(copy))] == alone


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # dropped files close themselves
def test_few_files_are_kept_open(written: Path) -> None:
    images = shards(written)
    images._files._most = 2
    for index in range(len(images)):
        images.read(index)
    assert len(images.shards) > 2 == len(images._files._files)


SAMPLE = {"n1/x.jpg": png(), "n2/y.jpg": png()}


@pytest.mark.parametrize(
    ("members", "labels", "names"),
    [
        ({"x.jpg": png(), "x.cls": b"3\n", "y.png": png(), "y.cls": b"0"}, [3, 0], []),
        ({"x.jpg": png(), "x.json": b'{"label": 2}'}, [2], []),
        ({"x.jpg": png(), "x.json": b'{"label": "cat"}'}, [0], ["cat"]),
        ({"x.jpg": png(), "x.json": b'{"label": 2}', "x.cls": b"1"}, [1], []),
        ({"z/10/x.jpg": png(), "2/x.jpg": png(), "10/y.jpg": png()}, [0, 1, 2], ["10", "2", "z"]),
        ({"x.jpg": png(), "x.json": b'{"caption": "a cat"}', "x.txt": b"a cat"}, None, []),
        ({"./a/x.jpg": png(), "./a/._x.jpg": b"of macOS", "__meta__": b""}, [0], ["a"]),
        ({"a/x.JPG": png(), "a/x.Cls": b"5", "a/y.v2.jpg": png(), "a/y.cls": b"4"}, [5, 4], []),
        ({f"a/{'long' * 60}.jpg": png(), f"a/{'long' * 60}.cls": b"1"}, [1], []),
        ({"ü/ß.jpg": png()}, [0], ["ü"]),
    ],
)
def test_labels(tmp_path: Path, members, labels, names) -> None:
    images = TarShards(make(tmp_path / "x.tar", members))
    found = None if images.labels is None else images.labels.tolist()
    assert (found, images.class_names) == (labels, names)
    assert images.read(0).size == (6, 5)
    assert TarShards(tmp_path / "x.tar", labels=False).labels is None


def test_a_class_file_says_names_and_order(tmp_path: Path) -> None:
    make(tmp_path / "train" / "00.tar", SAMPLE)
    (tmp_path / "classes.txt").write_text('n2,"cat, big"\nn1,dog\n')
    images = shards(tmp_path)
    assert images.labels.tolist() == [1, 0]
    assert (images.class_ids, images.class_names) == (["n2", "n1"], ["cat, big", "dog"])
    assert class_list(images) == ["n2", "n1"]
    other = tmp_path / "mine.txt"
    other.write_text("n1\nn0\nn2\n")
    assert shards(tmp_path, class_file=other).labels.tolist() == [0, 2]
    images = TarShards(make(tmp_path / "mine" / "x.tar", SAMPLE))
    assert images.class_names == ["n1", "n2"], "beside a folder that is no split's it says nothing"


def test_val_has_the_class_numbers_of_train(tmp_path: Path) -> None:
    make(tmp_path / "a-train-0.tar", SAMPLE | {"n0/z.jpg": png()})
    make(tmp_path / "a-validation-0.tar", {"n2/w.jpg": png()})
    assert shards(tmp_path, split="val").labels.tolist() == [2]
    train, val = (
        shards(
            train_shards=f"{tmp_path}/a-train-0.tar", split=split, val_fraction=0.5, labels=False
        )
        for split in ("train", "val")
    )
    assert (len(train), len(val)) == (2, 1)
    make(tmp_path / "a-test-0.tar", {"n2/t.jpg": png(), "n1/t.jpg": png()})
    whole = shards(tmp_path, split="test", val_fraction=0.5)
    assert whole.labels.tolist() == [1, 2], "a part of train is for val, none of test"
    with pytest.raises(UserError, match="both say what to judge on"):
        shards(train_shards=f"{tmp_path}/a-t*.tar", val_shards="x.tar", val_fraction=0.5)


def test_the_index_is_stored_and_lasts_while_shards_do(written, monkeypatch) -> None:
    shards(written)

    def refuse(*_: object) -> None:
        raise AssertionError("shards were listed again")

    with monkeypatch.context() as patch:
        patch.setattr(shard_index, "_build", refuse)
        before = shards(written)
        shard = Path(before.shards[0])
        status = shard.stat()
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        with pytest.raises(AssertionError):
            shards(written)
        with shard.open("ab") as file:
            file.write(bytes(512))
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(AssertionError):
            shards(written)
    assert shards(written).path(1) == before.path(1)
    index = next(written.glob(".train*.npz"))
    index.write_bytes(index.read_bytes()[:1000])
    assert shards(written).labels.tolist() == before.labels.tolist()
    with monkeypatch.context() as patch:
        patch.setattr(shard_index, "_build", refuse)
        shards(written)
    assert not list(written.glob("*.partial")) and not list(written.glob(".*.partial"))


def test_many_start_at_once_and_one_lists(tmp_path, monkeypatch) -> None:
    make(tmp_path / "x.tar", SAMPLE)
    built, build = [], shard_index._build

    def counted(*arguments):
        built.append(1)
        return build(*arguments)

    monkeypatch.setattr(shard_index, "_build", counted)
    with ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(lambda _: len(TarShards(tmp_path / "x.tar")), range(8)))
    assert counts == [2] * 8 and len(built) == 1


def test_an_index_that_cannot_lie_beside_goes_to_the_cache(tmp_path, monkeypatch, caplog) -> None:
    make(tmp_path / "data" / "x.tar", SAMPLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = shard_index._store

    def read_only(place, *rest):
        if place.parent == tmp_path / "data":
            raise PermissionError(13, "Permission denied")
        store(place, *rest)

    monkeypatch.setattr(shard_index, "_store", read_only)
    TarShards(tmp_path / "data" / "x.tar")
    assert list((tmp_path / "cache" / "octic" / "shards").glob(".x.*.npz"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "data" / "x.tar"))  # no folder either
    with caplog.at_level(logging.WARNING):
        assert len(TarShards(tmp_path / "data" / "x.tar")) == 2
    assert "data.index_folder=FOLDER" in caplog.text


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda b: b[:1200], "x.tar is cut"),
        (lambda b: b[:-10240], "x.tar is cut"),
        (lambda b: b[: 4 * 512], "x.tar is cut: it has no end of archive"),
        (lambda b: b[:512] + b"\xff" * 300, "x.tar is cut"),
        (lambda b: b[:1024] + b"rubbish" + b[1031:], "x.tar is damaged at byte 1,024"),
        (lambda b: b + b, "x.tar goes on behind its end"),
        (lambda b: b"", "x.tar is cut, or no tar file: empty file"),
        (lambda b: b"\x1f\x8b" + b, "x.tar is compressed"),
        (lambda b: b"text" * 500, "x.tar is cut, or no tar file"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path: Path, harm, said) -> None:
    path = make(tmp_path / "x.tar", SAMPLE)
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(UserError, match=said) as error:
        TarShards(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("members", "keywords", "said"),
    [
        ({"x.txt": b"a"}, {}, "x.tar holds no image; looked for members that end in jpg"),
        (SAMPLE, {"image": "png"}, "x.tar holds no image; looked for members that end in png"),
        ({"a/x.jpg": png(), "a/x.JPG": png()}, {}, "x.JPG: its key comes twice in this shard"),
        ({"x.jpg": png(), "x.seg.png": png()}, {}, "data.image=jpg or data.image=seg.png says it"),
        (
            {"x.jpg": png(), "x.cls": b"1", "y.jpg": png()},
            {},
            "1 of 2 images have no label .*y.jp",
        ),
        (
            {"x.jpg": png(), "a/y.jpg": png()},
            {},
            "no label .folder., which others have, as .*x.j",
        ),
        ({"x.jpg": png(), "x.cls": b"-1"}, {}, "has the label -1; data.labels=false"),
        ({"x.jpg": png(), "x.json": b"{"}, {}, "x.json is no readable json"),
        ({"x.jpg": png(), "x.json": b'{"label": [1]}'}, {}, r"label is \[1\]; a label is a whole"),
        ({"b/x.jpg": png()}, {"classes": ["a"]}, "its class 'b' is none of the 1 known"),
        (SAMPLE, {"class_file": "nowhere"}, "there is no class file nowhere"),
    ],
)
def test_unclear_shards_are_one_line(tmp_path: Path, members, keywords, said) -> None:
    with pytest.raises(UserError, match=said) as error:
        TarShards(make(tmp_path / "x.tar", members), **keywords)
    assert "\n" not in str(error.value)


def test_the_part_that_is_the_image_can_be_said(tmp_path: Path) -> None:
    path = make(tmp_path / "x.tar", {"x.jpg": png(1), "x.seg.png": png(9)})
    assert TarShards(path, image="jpg").read(0).getpixel((0, 0))[0] == 1
    assert TarShards(path, image=".SEG.png").read(0).getpixel((0, 0))[0] == 9


def test_a_key_of_the_json_is_a_label_of_its_own(tmp_path: Path) -> None:
    """Whichever was asked for first: the index that was stored for one is not the other's."""
    part = {"x.jpg": png(), "x.json": b'{"label": 2, "genus": "Pica", "order": "7"}'}
    part["x.seg.png"] = png()
    for split in ("train", "val"):
        make(tmp_path / f"{split}-0.tar", part)
    for split in ("train", "val", "train"):
        labels = [
            shards(tmp_path, split=split, image="jpg", **keywords).labels.tolist()
            for keywords in ({}, {"label_key": "order"}, {"label_key": "genus"})
        ]
        assert labels == [[2], [7], [0]]
    folder = tmp_path / "elsewhere"
    assert len(shards(tmp_path, image="jpg", index_folder=folder)) == 1
    assert len(list(folder.glob(".train-0.*.npz"))) == 1


def test_a_file_server_may_give_an_image_in_pieces(written: Path, monkeypatch) -> None:
    images, pread = shards(written), os.pread
    whole = [images.read_bytes(index) for index in range(len(images))]
    monkeypatch.setattr(os, "pread", lambda file, size, start: pread(file, min(size, 99), start))
    assert [images.read_bytes(index) for index in range(len(images))] == whole


def test_links_are_refused(tmp_path: Path) -> None:
    """Plain tar writes the second of two hard links without its bytes."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(png())
    os.link(tmp_path / "a" / "x.jpg", tmp_path / "a" / "y.jpg")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "a", "a")
    with pytest.raises(UserError, match=r"a/[xy].jpg is a link"):
        TarShards(tmp_path / "x.tar")


def test_a_class_file_that_contradicts_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "x.tar", {"a/x.jpg": png(), "a/x.cls": b"1"})
    for text, said in (
        ("a\nb\n", "has the label 1, but the class file has class 0 for its folder"),
        ("a\n", "has the label 1, the class file 1 classes"),
        ("b\na\na\n", "a class id comes twice"),
        ("a,b,c\n", "row 1: 3 columns"),
    ):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(UserError, match=said):
            TarShards(path)


def test_a_name_in_two_shards_is_told(tmp_path: Path, caplog) -> None:
    paths = [make(tmp_path / f"{number}.tar", SAMPLE) for number in range(2)]
    assert len(TarShards(paths)) == 4
    assert "2 names come in more than one shard, as n1/x.jpg" in caplog.text
    with pytest.raises(UserError, match="given twice"):
        TarShards([paths[0], paths[0]])


def test_what_a_shard_lost_since_is_named(tmp_path: Path) -> None:
    path = make(tmp_path / "x.tar", SAMPLE | {"n3/empty.jpg": b""})
    images = TarShards(path)
    with pytest.raises(ImageError, match=r"x.tar:n3/empty.jpg: empty file"):
        images.read(2)
    os.truncate(path, 540)
    with pytest.raises(ImageError, match=r"x.tar:n1/x.jpg: its shard has become shorter"):
        images.read(0)
    path.unlink()
    with pytest.raises(ImageError, match="No such file"):
        pickle.loads(pickle.dumps(images)).read(1)
