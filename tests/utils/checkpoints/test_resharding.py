"""A run goes on with another number of processes and in another layout, as if nothing had been."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.utils.checkpoints.test_checkpoint import save_as_format_1
from tests.utils.loop_case import parts_of, train_tiny, train_together
from utils.metrics_file import read_metrics

# What does not depend on how many share the work: no dropout, and one clipping for all.
PLAIN = {"dropout": 0.0, "accumulation": 2, "total_steps": 12}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("utils.metrics.draw_curves", lambda path: None)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train_tiny(folder, recipe=PLAIN)
    return folder


def go_on(folder: Path, processes: int, sharding: str, until: int) -> None:
    options = {"recipe": PLAIN, "sharding": sharding, "max_steps": until}
    if processes == 1:
        train_tiny(folder, **options)
    else:
        train_together(processes, [(str(folder), options)])


def losses_of(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def assert_as_undisturbed(folder: Path, undisturbed: Path) -> None:
    assert losses_of(folder) == pytest.approx(losses_of(undisturbed), rel=1e-5)
    ours, theirs = parts_of(folder), parts_of(undisturbed)
    for name, value in theirs["recipe"].items():
        if name != "centre":  # every rank has its own
            torch.testing.assert_close(ours["recipe"][name], value, rtol=0, atol=1e-6)
    for name, values in theirs["optimizer"]["state"].items():
        for key, value in values.items():
            torch.testing.assert_close(
                ours["optimizer"]["state"][name][key], value, rtol=1e-4, atol=1e-6
            )


def files_of(folder: Path) -> list[str]:
    step = (folder / "checkpoints/last").read_text().strip()
    return sorted(path.name for path in (folder / "checkpoints" / step).iterdir())


@pytest.mark.slow
def test_one_two_sharded_two_replicated_one(tmp_path, undisturbed):
    folder = tmp_path / "run"
    go_on(folder, 1, "replicate", 3)
    assert files_of(folder) == ["00000.safetensors", "checkpoint.json", "index.json"]
    plain = {"recipe": PLAIN}
    train_together(
        2,
        [
            (str(folder), {**plain, "sharding": "shard", "max_steps": 6}),
            (str(folder), {**plain, "sharding": "replicate", "max_steps": 9}),
        ],
    )
    # Each rank wrote its share of what both held alike.
    assert files_of(folder)[:2] == ["00000.safetensors", "00001.safetensors"]
    step = folder / "checkpoints/9"
    sizes = [(step / name).stat().st_size for name in files_of(folder)[:2]]
    assert min(sizes) > 1000
    index = json.loads((folder / "checkpoints/6/index.json").read_text())
    pieces = index["tensors"]["recipe/student.blocks.0.weight"]["pieces"]
    assert [(piece[0], piece[2], piece[3]) for piece in pieces] == [
        ("00000.safetensors", [0, 0], [3, 6]),
        ("00001.safetensors", [3, 0], [3, 6]),
    ]
    go_on(folder, 1, "replicate", 12)
    assert_as_undisturbed(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stages",
    [
        [(4, "shard"), (2, "replicate"), (4, "replicate"), (1, "shard")],
        [(2, "shard"), (4, "shard"), (1, "replicate"), (4, "hybrid")],
    ],
    ids=str,
)
def test_four_processes(tmp_path, undisturbed, stages):
    """Four do not divide the six rows of a weight: one of them holds nothing of it."""
    for number, (processes, sharding) in enumerate(stages, 1):
        go_on(tmp_path, processes, sharding, 3 * number)
    assert_as_undisturbed(tmp_path, undisturbed)


def begin_in_format_1(folder: Path) -> None:
    train_tiny(folder, max_steps=5)
    parts = {name: parts_of(folder)[name] for name in ("recipe", "optimizer", "progress")}
    shutil.rmtree(folder / "checkpoints")
    save_as_format_1(folder / "checkpoints", 5, parts)


def test_a_run_begun_in_format_1_goes_on_exactly(tmp_path):
    """What this project wrote before is read back bit for bit."""
    train_tiny(tmp_path / "whole")
    begin_in_format_1(tmp_path / "old")
    train_tiny(tmp_path / "old")
    left, right = parts_of(tmp_path / "old")["recipe"], parts_of(tmp_path / "whole")["recipe"]
    assert all(torch.equal(left[name], right[name]) for name in right)
    assert losses_of(tmp_path / "old") == losses_of(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_go_on_with_a_run_begun_in_format_1(tmp_path):
    """Each takes its shard of the whole tensors."""
    begin_in_format_1(tmp_path)
    train_together(2, [(str(tmp_path), {"sharding": "shard"})])
    assert len(losses_of(tmp_path)) == 12 and files_of(tmp_path)[0] == "00000.safetensors"
