"""train.lmdb and val.lmdb of a tree: read back alike, whole or not there, mistakes in one line."""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.data.lmdb_writer import main, main_of_folder, write_splits
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
pytest.importorskip("lmdb")


@pytest.fixture
def tree(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3), dtype=np.uint8)
    for number, array in enumerate(pixels):
        split, name = ("train", "val")[number > 3], "ab"[number % 2]
        folder = tmp_path / "tree" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / f"{number}.png")
    return tmp_path / "tree"


def test_the_reader_gives_the_folders_back(tree):
    from utils.data.images import ImageFolder
    from utils.data.lmdb import LmdbImages

    written = write_splits(tree, check="pixels")
    assert {path.name: count for path, count in written.items()} == {"train.lmdb": 4, "val.lmdb": 2}
    for split in ("train", "val"):
        ours, theirs = LmdbImages(root=tree, split=split), ImageFolder(tree / split)
        assert ours.class_names == ["a", "b"] and ours.labels.tolist() == theirs.labels.tolist()
        for index in range(len(theirs)):
            assert ours.read(index).tobytes() == theirs.read(index).tobytes()
    with pytest.raises(UserError, match="exists; remove it"):
        write_splits(tree)


def test_val_has_the_class_numbers_of_train_and_lies_where_a_home_is(tree, monkeypatch):
    from utils.data.lmdb import LmdbImages

    for path in (tree / "val" / "a").iterdir():
        path.unlink()
    (tree / "val" / "a").rmdir()
    write_splits(tree)
    monkeypatch.setenv("HOME", str(tree))
    images = LmdbImages("~/val.lmdb")
    assert images.labels.tolist() == [1] and images.class_names == ["a", "b"]


@pytest.mark.parametrize(
    ("harm", "check", "said"),
    [
        (b"no image", "header", "cannot read image .*4.png"),
        (None, "pixels", "cannot read image .*4.png: damaged"),
    ],
)
def test_a_bad_image_is_named_and_leaves_no_half_file(tree, tmp_path, harm, check, said):
    """A damaged end shows when every image is decoded alone."""
    victim = tree / "val" / "a" / "4.png"
    victim.write_bytes(harm or victim.read_bytes()[:-2000])
    with pytest.raises(UserError, match=said):
        write_splits(tree, output=tmp_path / "out", check=check)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.lmdb"]


def test_foreign_classes_and_missing_folders(tree, tmp_path):
    (tree / "val" / "c").mkdir()
    with pytest.raises(UserError, match="classes that train has not: c"):
        write_splits(tree)
    with pytest.raises(UserError, match="it lacks train and val"):
        write_splits(tree / "val")
    with pytest.raises(UserError, match="does not exist"):
        write_splits(tmp_path / "nothing")


def test_a_full_disk_is_one_line(tree, tmp_path):
    """The limit on a file's size stands for the disk's."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(
        [sys.executable, "experiments/make_lmdb.py", "--dir", tree, "--output", tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "cannot write" in done.stderr and not list((tmp_path / "out").iterdir())


def test_command_line_mistakes(capsys):
    for words in ([], ["--dri", "x"], ["--dir", "x", "--num-threads", "0"]):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_command_of_one_folder(tree, tmp_path):
    command = [sys.executable, "-m", "utils.data.lmdb"]
    done = subprocess.run(
        [*command, tree / "train", tmp_path / "one.lmdb"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"images in {tmp_path / 'one.lmdb'}\n")
    assert (tmp_path / "one.lmdb").is_file()


def test_command_of_one_folder_mistakes(tree, tmp_path, capsys):
    for words in ([], ["--x"], [str(tmp_path / "no"), "x.lmdb"], [str(tree), str(tree / "train")]):
        with pytest.raises(SystemExit) as left:
            main_of_folder(words)
        assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_who_reads_imports_no_writing():
    program = "import sys, utils.data.lmdb; assert 'utils.data.packing' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
