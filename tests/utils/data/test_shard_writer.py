"""Shards of a tree: written whole, gone on with after a stop, mistakes in one line."""

import json
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.data.images import ImageError
from utils.data.shard_writer import main, write_splits
from utils.data.shards import TarShards, shards
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
SMALL = {"shard_mb": 0.03}  # two images of noise


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        folder = tmp_path / "tree" / ("train", "val")[number > 5] / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "tree" / "labels.txt").write_text("b,bee\nz,zebra\n")
    return tmp_path / "tree"


def members(path: Path) -> list[str]:
    with tarfile.open(path) as archive:
        return archive.getnames()


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")


def test_layout(tree: Path, tmp_path: Path) -> None:
    """Image and class one after another, sizes kept, train shuffled, the same bytes each time."""
    written = write_splits(tree, output=tmp_path / "out", **SMALL)
    shown = [f"train-{n:06d}.tar" for n in range(3)] + ["val-000000.tar"]
    assert visible(tmp_path / "out") == ["_info.json", "classes.txt", *shown]
    assert [(path.name, count) for path, count in written.items()] == [(n, 2) for n in shown]
    assert (tmp_path / "out" / "classes.txt").read_text() == "a\nb,bee\n"
    assert members(tmp_path / "out" / "val-000000.tar") == [
        "a/6.png",
        "a/6.cls",
        "b/7.png",
        "b/7.cls",
    ]
    train = [name for n in shown[:3] for name in members(tmp_path / "out" / n)]
    assert sorted(train) != train and len(set(train)) == 12
    info = json.loads((tmp_path / "out" / "_info.json").read_text())["splits"]
    assert info["train"]["filenames"] == shown[:3] and info["train"]["shard_lengths"] == [2, 2, 2]
    assert info["validation"]["num_samples"] == 2
    again = write_splits(tree, output=tmp_path / "again", **SMALL)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]


def test_a_stopped_writing_goes_on(tree: Path, tmp_path: Path) -> None:
    """What was whole is kept; half a set is not read, nor is it taken for another's."""
    out, victim = tmp_path / "out", tree / "train" / "b" / "3.png"
    kept = victim.read_bytes()
    victim.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"3\.png"):
        write_splits(tree, output=out, num_threads=1, **SMALL)
    first = out / "train-000000.tar"
    before = first.stat().st_mtime_ns
    assert not list(out.glob("*.partial")) and not list(out.glob(".*.partial"))
    with pytest.raises(UserError, match="not all written"):
        shards(out)
    for other in ({**SMALL, "seed": 1}, {"shard_mb": 0.06}):
        with pytest.raises(UserError, match="unfinished writing of train with other images"):
            write_splits(tree, output=out, **other)
    victim.write_bytes(kept)
    (tree / "train" / "0").mkdir()  # an empty class before the others gives these new numbers
    with pytest.raises(UserError, match="unfinished writing of train with other images"):
        write_splits(tree, output=out, **SMALL)
    (tree / "train" / "0").rmdir()
    (out / ".train-000001.tar.1.partial").touch()  # as kill -9 leaves it
    write_splits(tree, output=out, **SMALL)
    assert not list(out.glob(".*.partial")) and first.stat().st_mtime_ns == before
    whole = write_splits(tree, output=tmp_path / "whole", **SMALL)
    assert [path.read_bytes() for path in whole] == [
        (out / path.name).read_bytes() for path in whole
    ]
    assert write_splits(tree, output=out, **SMALL).keys() == {out / path.name for path in whole}
    assert first.stat().st_mtime_ns == before, "a finished writing is left alone"
    with pytest.raises(UserError, match="train-000000.tar exists; remove the shards of train"):
        write_splits(tree, output=out, seed=1, **SMALL)


def test_bad_images_can_be_left_out(tree: Path, tmp_path: Path, capsys) -> None:
    victim = tree / "train" / "b" / "3.png"
    victim.write_bytes(victim.read_bytes()[:-2000])
    write_splits(tree, output=tmp_path / "out", check="pixels", skip_damaged=True, **SMALL)
    assert "left out: cannot read image" in capsys.readouterr().out
    images = shards(tmp_path / "out")
    assert len(images) == 5 and images.labels.tolist() == [0, 0, 0, 1, 1]


def test_any_folder_can_be_written_whole(tree: Path, tmp_path: Path) -> None:
    """Without sub-folders there are no labels; endings are those that timm looks for."""
    Image.new("RGB", (4, 4)).save(tree / "train" / "a" / "x.y.JPEG")
    (path,) = write_splits(tree / "train" / "a", output=tmp_path / "out", whole=True)
    assert sorted(members(path)) == ["0.png", "2.png", "4.png", "x_y.jpg"]
    assert TarShards(path).labels is None and "classes.txt" not in visible(tmp_path / "out")


def test_mistakes(tree: Path, tmp_path: Path) -> None:
    (tree / "train" / "a" / "0.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"a/0.jpg and a/0.png .* would have one key, a/0, in sh"):
        write_splits(tree, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tree / "train" / "a" / "0.jpg").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "classes.txt").write_text("ape\nbee\n")
    with pytest.raises(UserError, match=r"classes.txt has other classes than"):
        write_splits(tree, output=tmp_path / "out")
    (tree / "val" / "c").mkdir()
    with pytest.raises(UserError, match="classes that train has not: c"):
        write_splits(tree)


def test_a_full_disk_is_one_line(tree: Path, tmp_path: Path) -> None:
    """The limit on a file's size stands for the disk's."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(
        [sys.executable, "experiments/make_shards.py", "--dir", tree, "--output", tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "cannot write" in done.stderr and visible(tmp_path / "out") == ["classes.txt"]


def test_the_command(tree: Path, capsys) -> None:
    main(["--dir", str(tree), "--shard-mb", "1"])
    assert capsys.readouterr().out.splitlines()[0].endswith("train-000000.tar: 6 images, 0.1 MB")
    for words in ([], ["--dri", "x"], ["--dir", "x", "--shard-mb", "0"], ["--dir", "x"]):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1
