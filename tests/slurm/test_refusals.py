"""What is said before anything is started: of the run folder, and of every point of a sweep."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from slurm.command import main
from slurm.launch import launch_all
from slurm.task import Task
from utils.checkpoints.checkpoint import Checkpoints
from utils.config.build import plain
from utils.config.compose import compose_config, parse_config
from utils.run_files import CHECKPOINTS, CONFIG

SMALL = ["backbone.depth=2", "backbone.embed_dim=16", "backbone.num_heads=2"]


def task(folder: Path, *words: str, **values: str) -> Task:
    words = (*SMALL, f"output_dir='{folder}'", *words)
    config: dict[str, Any] = plain(compose_config("deit/quickstart.yaml", list(words)))
    return Task("tests.slurm.work.report", config, values)


def refused(capsys, tasks: list[Task], folder: Path, *, dry_run: bool = False) -> str:
    with pytest.raises(SystemExit) as left:
        launch_all(tasks, folder=folder, dry_run=dry_run)
    assert left.value.code == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    return told.err


@pytest.mark.parametrize("launcher", ["here", "slurm"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_file_where_the_run_folder_should_be(
    tmp_path: Path, capsys, monkeypatch, launcher: str, dry_run: bool
) -> None:
    monkeypatch.setattr("slurm.launch.check_machine", lambda cluster: None)
    (tmp_path / "file").write_text("x")
    folder = tmp_path / "file" / "run"
    line = refused(capsys, [task(folder, f"launcher={launcher}")], folder, dry_run=dry_run)
    assert line == f"error: output_dir: cannot make {folder}: {tmp_path / 'file'} is a file\n"


def test_a_point_that_could_not_train_is_found_before_the_first_one_does(
    tmp_path: Path, capsys
) -> None:
    points = [
        task(tmp_path / f"lr={lr}", f"recipe.schedules.lr={lr}", lr=lr) for lr in ("1e-3", "-1")
    ]
    line = refused(capsys, points, tmp_path)
    assert line.startswith("error: lr=-1: recipe.schedules.lr must be finite and at least 0")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_objects_to_what_the_run_would(tmp_path: Path, capsys) -> None:
    for word, said in [
        ("training.precision=fp8", "training.precision=fp8 is unknown"),
        ("recipe.num_workers=-1", "recipe.num_workers must be a whole number from 0"),
    ]:
        assert said in refused(capsys, [task(tmp_path / "run", word)], tmp_path, dry_run=True)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_batch_that_the_processes_of_a_job_cannot_make(
    tmp_path: Path, capsys, monkeypatch, dry_run: bool
) -> None:
    """Of a run on this machine too, where a sweep or a dry run is asked for."""
    monkeypatch.setattr("slurm.launch.check_machine", lambda cluster: None)
    words = ["launcher=slurm", "launcher.nodes=3"]
    line = refused(capsys, [task(tmp_path / "run", *words)], tmp_path, dry_run=dry_run)
    assert "batch_size_per_gpu 64 x 3 processes does not make effective_batch_size 64" in line
    sizes = ("64", "48")
    points = [task(tmp_path / n, f"recipe.effective_batch_size={n}", size=n) for n in sizes]
    line = refused(capsys, points, tmp_path, dry_run=dry_run)
    assert line.startswith("error: size=48: batch_size_per_gpu 64 x 1 processes does not make")
    assert not list(tmp_path.iterdir())


def with_a_run_of_another_network(folder: Path) -> None:
    Checkpoints(folder / CHECKPOINTS).save(1, {"recipe": {"weight": torch.zeros(1)}})
    (folder / CONFIG).write_text("backbone: {num_classes: 3}")


def test_a_folder_with_a_run_of_another_network(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    with_a_run_of_another_network(folder)
    said = f"error: {folder} holds a run of another network (backbone.num_classes: 3 -> 10"
    assert said in refused(capsys, [task(folder)], folder, dry_run=True)
    words = [*SMALL, "--check", "--output-dir", str(folder)]
    with pytest.raises(SystemExit) as left:
        main("tests.slurm.work.report", partial(parse_config, "deit/quickstart.yaml"), words)
    told = capsys.readouterr()
    assert left.value.code == 2 and told.err.startswith(said) and told.out == ""


def test_check_looks_into_the_run_folder_of_every_point(tmp_path: Path, capsys) -> None:
    with_a_run_of_another_network(tmp_path / "seed=2")
    words = [*SMALL, "--check", "-m", "seed=1,2", "--output-dir", str(tmp_path)]
    with pytest.raises(SystemExit) as left:
        main("tests.slurm.work.report", partial(parse_config, "deit/quickstart.yaml"), words)
    told = capsys.readouterr()
    assert left.value.code == 2 and told.out == ""
    assert told.err.startswith(f"error: seed=2: {tmp_path}/seed=2 holds a run of another network")


def test_the_trainings_of_a_comparison_are_looked_at_too(tmp_path: Path, capsys) -> None:
    def comparison(seed: str, *words: str) -> Task:
        run, folder = task(tmp_path, *words), str(tmp_path / f"seed={seed}")
        config = {"output_dir": folder, "runs": {"plain": run.config, "loaded": "file"}}
        return replace(run, config=run.config | config | {"recipe": None}, values={"seed": seed})

    points = [comparison("1"), comparison("2", "recipe.epochs=-1")]
    assert refused(capsys, points, tmp_path).startswith("error: seed=2: plain: recipe.epochs must")
    with_a_run_of_another_network(tmp_path / "seed=1" / "plain")
    said = f"error: seed=1: plain: {tmp_path}/seed=1/plain holds a run of another network"
    assert refused(capsys, [comparison("1")], tmp_path, dry_run=True).startswith(said)
