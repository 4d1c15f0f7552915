"""What a run folder says of a run that goes on otherwise than it began."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm.optim
import torch

from tests.utils.loop_case import train_tiny
from utils.checkpoints.checkpoint import Checkpoints
from utils.errors import UserError
from utils.run_folder import changed_keys, changed_plan, prepare_folder, saved_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch) -> None:
    monkeypatch.setattr("utils.metrics.draw_curves", lambda path: None)


def test_another_number_of_steps_is_told_with_both(tmp_path: Path, capsys) -> None:
    """It may follow from the number of processes alone, which no config names."""
    train_tiny(tmp_path, max_steps=2)
    train_tiny(tmp_path, max_steps=4)
    assert "WARNING" not in capsys.readouterr().out
    train_tiny(tmp_path, max_steps=6, recipe={"total_steps": 8})
    out = capsys.readouterr().out
    assert "WARNING: the run goes on with another plan" in out and "total steps 12 -> 8\n" in out
    train_tiny(tmp_path, max_steps=7, recipe={"total_steps": 8})  # as the last checkpoint was
    train_tiny(tmp_path, max_steps=7)  # trains nothing
    assert "WARNING" not in capsys.readouterr().out


def test_another_batch_is_told_with_what_would_keep_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, plan={"total_steps": 50, "images_per_step": 8})
    assert changed_plan({}, checkpoints) == [], "a checkpoint of before there were plans"
    checkpoints.plan_before = {"total_steps": 100, "images_per_step": 4}
    (line,) = changed_plan({"recipe": {}}, checkpoints)
    assert "total steps 100 -> 50, images per step 4 -> 8; as many processes" in line
    (line,) = changed_plan({"recipe": {"effective_batch_size": None}}, checkpoints)
    assert "8; recipe.effective_batch_size=4 would keep the batch" in line


def test_what_changes_the_weights_is_told_and_nothing_else() -> None:
    """Whatever is named alike: what is judged on is harmless, what part of the images is not."""
    before = {
        "name": "a",
        "data": {"val_fraction": 0.1, "val": {"split": "val"}},
        "recipe": {"num_workers": 2, "augmentation": {}, "smoothing": 0.1},
        "training": {"max_steps": 5, "clip_grad": 1.0},
    }
    harmless = {
        "name": "b",
        "data": {**before["data"], "val": {"split": "test", "fraction": 0.5}},
        "recipe": {**before["recipe"], "num_workers": 8},
        "training": {"clip_grad": 1.0},
    }
    assert changed_keys(before, harmless) == []
    other = {
        **harmless,
        "data": {**before["data"], "val_fraction": 0.2},
        "recipe": {"augmentation": {"crop": "simple"}},
        "seed": 1,
    }
    assert changed_keys(before, other) == [
        "data.val_fraction: 0.1 -> 0.2",
        "recipe.augmentation: {} -> absent",
        "recipe.smoothing: 0.1 -> absent",
        "recipe.augmentation.crop: absent -> simple",
        "seed: absent -> 1",
    ]


def test_every_config_that_a_run_had_is_kept(tmp_path: Path) -> None:
    for value in (1, 2, 2, 3):
        prepare_folder(tmp_path, {"value": value}, Checkpoints(tmp_path))
    kept = {path.name: saved_config(path)["value"] for path in tmp_path.glob("config*.yaml")}
    assert kept == {"config.1.yaml": 1, "config.2.yaml": 2, "config.yaml": 3}


UNREAD = """
import sys
from tests.utils.loop_case import train_tiny
train_tiny(sys.argv[1], log_every=1)
print("and a line of somebody else", flush=True)
print("and an error", file=sys.stderr, flush=True)
"""


@pytest.mark.parametrize("errors", [subprocess.PIPE, subprocess.STDOUT])
def test_a_run_goes_on_when_nobody_reads_it(tmp_path: Path, errors: int) -> None:
    """`... | head` closes the pipe; what the run is for is in its folder."""
    with subprocess.Popen(
        [sys.executable, "-c", UNREAD, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=errors,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        said = process.stderr.read().decode() if process.stderr else "and an error\n"
        assert process.wait(timeout=300) == 0 and said == "and an error\n"
    assert (tmp_path / "checkpoints" / "12").is_dir() and (tmp_path / "summary.json").is_file()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 12


def test_a_config_that_is_no_yaml_is_one_line(tmp_path: Path) -> None:
    train_tiny(tmp_path, max_steps=2)
    for text in ("a: [1", "- a"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=r"config\.yaml is no .*: mend or remove it") as caught:
            train_tiny(tmp_path, max_steps=3)
        assert "\n" not in str(caught.value)


def test_weights_that_began_a_run_need_not_be_named_again(tmp_path: Path, capsys) -> None:
    train_tiny(tmp_path / "first", max_steps=1)
    train_tiny(tmp_path / "run", weights=str(tmp_path / "first"), max_steps=1)
    train_tiny(tmp_path / "run", max_steps=2)
    assert "WARNING" not in capsys.readouterr().out


def test_a_probe_without_its_images_is_left_out_at_the_start(tmp_path: Path, capsys) -> None:
    """The run goes to its end, and the other probes judge it."""

    def both(net: object, data: dict[str, object], **more: object) -> dict[str, float]:
        return {"size": len(str(data["val"]))}

    def neither(net: object, data: object, **more: object) -> dict[str, float]:
        return {"it": 1.0}

    neither.splits = ()
    probes = {"knn": both, "own": neither}
    summary, _ = train_tiny(tmp_path, probes=probes, data={}, max_steps=1)
    assert summary["own/it"] == 1.0 and "knn/size" not in summary
    told = capsys.readouterr().out
    assert told.index("probe knn is left out: there is no data.val") < told.index("step 1")


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (torch.optim.AdamW, partial(torch.optim.AdamW, amsgrad=True)),
        (partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW),
        (torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)),
        (timm.optim.Lamb, torch.optim.AdamW),
    ],
)
def test_going_on_with_another_optimiser_is_one_line(tmp_path: Path, first, then) -> None:
    train_tiny(tmp_path, optimizer=first, max_steps=2)
    with pytest.raises(UserError, match=r"of another optimiser .* it has no \w+"):
        train_tiny(tmp_path, optimizer=then, max_steps=3)
    summary, _ = train_tiny(tmp_path, optimizer=first, max_steps=3)
    assert summary["step"] == 3


def test_the_name_stands_in_the_config_as_it_is(tmp_path: Path) -> None:
    name = "läufe, " + "lang " * 40 + "ü"
    train_tiny(tmp_path, name=name, max_steps=1)
    assert f"name: {name}\n" in (tmp_path / "config.yaml").read_text()
