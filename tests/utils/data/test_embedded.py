"""The embedded data are real files that ordinary readers read, written once whoever asks first."""

import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import VOCSegmentation

from utils.data import embedded
from utils.data.encoded import encoded_image
from utils.data.imagenet import ImageNetTree, write_extra
from utils.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded.ensure_embedded(tmp_path_factory.mktemp("data") / "embedded")


def test_digits_are_an_imagenet_tree(root: Path, tmp_path: Path) -> None:
    train, val = embedded.digits(root), embedded.digits(root, split="val")
    assert (len(train), len(val)) == (1438, 359)
    assert train.class_names == val.class_names == embedded.CLASS_NAMES
    share = np.bincount(val.labels) / (np.bincount(train.labels) + np.bincount(val.labels))
    assert np.all(np.abs(share - 0.2) < 0.01)
    image = train.read(0)
    assert (image.mode, image.size, Path(train.path(0)).name) == ("RGB", (32, 32), "digit0_1.JPEG")
    assert np.asarray(image).std() > 50
    write_extra(root / "digits", tmp_path)
    indexed = ImageNetTree(root / "digits", split="val", extra=tmp_path, check_size=False)
    assert [indexed.path(i) for i in range(359)] == [val.path(i) for i in range(359)]


def test_photographs_are_a_folder_without_labels(root: Path) -> None:
    images = embedded.photographs(root)
    assert (len(images), images.labels, images.read(0).size) == (2, None, (640, 427))
    assert (root / "photographs" / "README.txt").exists()


def test_photographs_are_there_as_often_as_asked_for(root: Path) -> None:
    once, often = embedded.photographs(root), embedded.photographs(root, copies=3)
    assert [often.path(i) for i in range(len(often))] == [once.path(i) for i in (0, 1)] * 3
    assert often.labels is None and often.read(5).size == (640, 427)
    assert encoded_image(often, 4).data == once.read_bytes(0)


@pytest.mark.parametrize("copies", [0, -2, 1.5, True, "many"])
def test_copies_that_cannot_be_are_one_line(root: Path, copies: object) -> None:
    with pytest.raises(UserError, match="copies must be a whole number of at least 1, got"):
        embedded.photographs(root, copies=copies)


@pytest.mark.parametrize(("split", "count"), [("train", 240), ("val", 80)])
def test_scenes_are_a_voc_tree(root: Path, split: str, count: int) -> None:
    scenes = VOCSegmentation(str(embedded.segmentation_root(root)), image_set=split)
    assert len(scenes) == count
    seen = set()
    for number in range(0, count, 4):
        image, mask = scenes[number]
        assert (image.mode, mask.mode) == ("RGB", "P")
        assert image.size == mask.size == (128, 128)
        found = set(np.unique(np.asarray(mask)).tolist())
        assert 0 in found and embedded.VOID in found and len(found) >= 3
        seen |= found
    assert seen == {*range(11), embedded.VOID}
    assert mask.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]


def test_the_palette_is_vocs() -> None:
    palette = np.array(embedded.voc_palette()).reshape(256, 3)
    known = {0: (0, 0, 0), 1: (128, 0, 0), 7: (128, 128, 128), 8: (64, 0, 0), 20: (0, 64, 128)}
    for index, colour in {**known, 255: (224, 224, 192)}.items():
        assert tuple(palette[index]) == colour


def test_what_is_complete_is_kept_and_what_is_not_is_made_again(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "embedded"
    shutil.copytree(root, copy)
    stamp = (copy / embedded.STAMP).stat().st_mtime_ns
    (copy / "digits" / "entries-TRAIN.npy").touch()  # what others put there does no harm
    embedded.ensure_embedded(copy)
    assert (copy / embedded.STAMP).stat().st_mtime_ns == stamp
    next((copy / "digits/train/digit3").iterdir()).unlink()
    assert len(embedded.digits(copy)) == 1438
    (copy / embedded.STAMP).write_text("0 2000\n")
    (tmp_path / ".embedded.killed.partial" / "digits").mkdir(parents=True)
    embedded.ensure_embedded(copy)
    assert (copy / embedded.STAMP).read_text() == (root / embedded.STAMP).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["embedded", "embedded.lock"]


def test_every_writing_is_the_same(root: Path, tmp_path: Path) -> None:
    again = embedded.ensure_embedded(tmp_path / "embedded")
    files = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    assert len(files) == 1797 + 1 + 3 + 2 * 320 + 2 + 1
    assert all((root / file).read_bytes() == (again / file).read_bytes() for file in files)


def test_strange_files_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "embedded").mkdir()
    (tmp_path / "embedded" / "mine.png").touch()
    with pytest.raises(UserError, match="is not touched"):
        embedded.digits(tmp_path / "embedded")
    assert (tmp_path / "embedded" / "mine.png").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="set OCTIC_DATA"):
        embedded.digits(tmp_path / "file" / "embedded")


def test_a_failed_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "_write_scenes", full)
    with pytest.raises(UserError, match="No space left on device"):
        embedded.digits(tmp_path / "embedded")
    assert [path.name for path in tmp_path.iterdir()] == ["embedded.lock"]


def test_the_place_is_that_of_the_environment(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTIC_DATA", str(root.parent))
    assert embedded.ensure_embedded() == root
    monkeypatch.delenv("OCTIC_DATA")
    monkeypatch.chdir(root.parent)
    os.symlink(root.parent, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert embedded.ensure_embedded() == tmp_path / "data" / "embedded"


def _count(root: Path, queue: multiprocessing.Queue) -> None:
    queue.put(len(embedded.digits(root)))


@pytest.mark.slow
def test_several_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=_count, args=(tmp_path / "embedded", queue)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    assert [queue.get(timeout=200) for _ in processes] == [1438] * 3
    for process in processes:
        process.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["embedded", "embedded.lock"]
