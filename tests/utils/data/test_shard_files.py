"""Which files are the shards that a pattern, or a split of a folder, means; what lacks is named."""

import json
from pathlib import Path

import pytest

from utils.data.shard_files import expand, shards_of_split
from utils.data.shards import shards
from utils.errors import UserError


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("t-{000..003}.tar", "1 of 4 shards are missing: .*t-002.tar"),
        ("t-{3..1}.tar", "runs backwards"),
        ("t-{abc}.tar", "is no range as"),
        ("u-*.tar", "no shard is named like .*u-"),
        ("", "no shards were given"),
        ("https://host/x.tar", "read from disk, not from https"),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, said: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (0, 1, 3):
        (tmp_path / f"t-{number:03d}.tar").touch()
    names = [Path(path).name for path in expand("t-{000..001}.tar")]
    assert names == ["t-000.tar", "t-001.tar"]
    assert len(expand("t-00{0,3}.tar")) == 2 and len(expand("t-*.tar")) == 3
    assert len(expand(tmp_path)) == 3
    with pytest.raises(UserError, match=said):
        expand(pattern)


def test_missing_shards_of_a_folder_are_named(tmp_path: Path) -> None:
    for number in (1, 2, 4):
        (tmp_path / f"imagenet-train-{number:04d}.tar").touch()
        (tmp_path / f"x-val-{number:05d}-of-00005.tar").touch()
    with pytest.raises(UserError, match=r"1 shards of train are missing .*train-0003.tar"):
        shards_of_split(tmp_path, "train")
    with pytest.raises(UserError, match=r"2 shards of val .*00003-of-00005.tar, .*00005-of-00005"):
        shards_of_split(tmp_path, "val")
    with pytest.raises(UserError, match=r"no shards of test .*it holds imagenet-train-0001.tar"):
        shards_of_split(tmp_path, "test")
    with pytest.raises(UserError, match="no split 'valid' in shards"):
        shards(tmp_path, split="valid")
    (tmp_path / "imagenet-train-0003.tar").touch()
    assert len(shards_of_split(tmp_path, "train")) == 4
    (tmp_path / ".train.plan.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="not all written: the same make_shards.py again"):
        shards_of_split(tmp_path, "train")


def test_a_split_that_was_not_given_names_its_own_key() -> None:
    """Beside one that was given: what is asked for is not what is there already."""
    with pytest.raises(UserError, match=r"no shards of val .*data.val_shards=.*data.val_fraction"):
        shards(split="val", train_shards="x-{000..003}.tar")
    with pytest.raises(UserError, match="no shards of train .*data.train_shards="):
        shards(val_shards="x-{000..003}.tar")
