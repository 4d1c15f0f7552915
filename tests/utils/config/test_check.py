"""What --check tells before a run: costs, and what the run would refuse."""

from pathlib import Path

import pytest

from utils.config.build import plain
from utils.config.check import VALID, check, check_runs, look_at_data, look_at_weights
from utils.config.compose import compose_config
from utils.config.files import CONFIGS
from utils.errors import UserError

SMALL = ["backbone.depth=2", "backbone.embed_dim=16", "backbone.num_heads=2"]

# Data that need no root.
GIVEN = {
    "lmdb": ["data.train_file=a.lmdb", "data.val_file=b.lmdb"],
    "shards": ["data.train_shards=a.tar", "data.val_fraction=0.1"],
}
FOLDER = {"_target_": "utils.data.images.folder"}
TREE = {"_target_": "utils.data.imagenet.ImageNetTree"}


def training(*words: str) -> dict:
    return plain(compose_config("deit/quickstart.yaml", [*SMALL, *words]))


def test_a_config_of_trainings_is_told_by_their_names(tmp_path: Path, capsys) -> None:
    runs = {"one": training(f"output_dir='{tmp_path}'"), "loaded": "runs/x"}
    check_runs({"name": "both"}, runs)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "{name: both}" and told[-1] == f"# {VALID}"
    assert told[2].startswith("# one: backbone hybrid_deit_small_patch16: 0.0")
    assert not any("loaded" in line for line in told)
    with pytest.raises(UserError, match="^two: recipe.epochs must be"):
        check_runs({}, runs | {"two": training("recipe.epochs=-1")})


def test_a_folder_that_is_not_here_is_a_note(tmp_path: Path) -> None:
    assert look_at_data({}) == look_at_data({"data": {"root": None, "train": TREE}}) == []
    away = str(tmp_path / "away")
    for train in (None, TREE, FOLDER):
        note = f"note: data.root: there is no {away} on this machine"
        assert look_at_data({"data": {"root": away, "train": train}}) == [note]


@pytest.mark.parametrize("group", [file.stem for file in sorted((CONFIGS / "data").glob("*.yaml"))])
def test_data_without_any_folder_is_a_note(group: str, tmp_path: Path, monkeypatch) -> None:
    """A run would refuse it at once; but the config may be for another machine."""
    for name in ("IMAGENET_PATH", "EXTRA_PATH"):
        monkeypatch.delenv(name, raising=False)
    bare = plain(compose_config("train.yaml", [f"data={group}"]))["data"]
    notes = ["note: data.root is not given; without it a run stops at once"]
    assert look_at_data({"data": bare}) == (notes if "root" in bare else [])
    given = plain(compose_config("train.yaml", [f"data={group}", *GIVEN.get(group, [])]))["data"]
    if "root" in given:
        given = given if group in GIVEN else given | {"root": str(tmp_path)}
        assert look_at_data({"data": given}) == []


@pytest.mark.parametrize("place", ["weights", "training.weights"])
def test_a_file_of_weights_that_is_not_here_is_a_note(place: str, tmp_path: Path) -> None:
    def notes(weights: str | None) -> list[str]:
        content = {"weights": weights} if place == "weights" else {"training": {"weights": weights}}
        return look_at_weights(content)

    away = str(tmp_path / "away.pth")
    assert notes(away) == [f"note: {place}: there is no {away} on this machine"]
    assert notes(None) == notes(str(tmp_path)) == notes("https://host/net.pth") == []


def test_what_a_command_refuses_besides_is_no_valid_config(tmp_path: Path, capsys) -> None:
    def refuse() -> None:
        raise UserError("not this one")

    config = training(f"output_dir='{tmp_path}'")
    with pytest.raises(UserError, match="not this one"):
        check(config, refuse)
    with pytest.raises(UserError, match="not this one"):
        check_runs(config, {}, refuse)
    assert VALID not in capsys.readouterr().out


def test_a_folder_of_splits_is_refused_by_the_names_in_it(tmp_path: Path) -> None:
    data = {"root": str(tmp_path), "train": FOLDER}
    assert look_at_data({"data": data}) == []
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    with pytest.raises(UserError, match="holds train and val, which are splits and no classes"):
        look_at_data({"data": data})
    assert look_at_data({"data": data | {"train": TREE}}) == []
