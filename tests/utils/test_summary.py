"""summary.json says how a run ended, over all its attempts; a command with no step left adds."""

import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.utils.loop_case import TinyRecipe, train_tiny
from utils.errors import UserError
from utils.metrics_file import read_metrics
from utils.summary import write_summary


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr("utils.metrics.draw_curves", lambda path: None)


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def judging(value: float, calls: list[int] | None = None):
    def probe(net, *, data, output_dir, step):
        if calls is not None:
            calls.append(step)
        return {"top1": value}

    return probe


def test_finished_means_all_steps_of_the_recipe(tmp_path, capsys):
    stopped, _ = train_tiny(tmp_path, max_steps=5)
    assert (stopped["finished"], stopped["stopped_by"]) == (False, "training.max_steps")
    assert "training.max_steps" in capsys.readouterr().out
    assert json.loads((tmp_path / "progress.json").read_text())["total_steps"] == 12

    def tell(step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGUSR2)

    told, _ = train_tiny(tmp_path, recipe={"on_step": tell})
    assert (told["step"], told["finished"], told["stopped_by"]) == (8, False, "SIGUSR2")
    whole, _ = train_tiny(tmp_path)
    assert (whole["step"], whole["finished"], whole["stopped_by"]) == (12, True, "")


def test_no_number_of_steps_prolongs_a_recipe(tmp_path, capsys):
    """And of probes that have judged before, those are told that are asked again."""
    ended, _ = train_tiny(tmp_path, max_steps=99, probes={"a": judging(50.0), "c": judging(1.0)})
    assert (ended["step"], ended["finished"], ended["stopped_by"]) == (12, True, "")
    capsys.readouterr()
    train_tiny(tmp_path, max_steps=99, probes={"c": judging(1.0), "b": judging(2.0)})
    printed = capsys.readouterr().out
    assert "already finished at step 12\n" in printed
    assert "judged before, with the same settings: c\n" in printed


def test_a_probe_that_fails_at_the_end_leaves_the_summary(tmp_path):
    """With the figures of those before it, of this step alone; the next start runs the others."""
    calls: list[int] = []

    def failing(net, *, data, output_dir, step):
        if step == 12:
            raise UserError("cannot read image 3")
        return {"top1": 1.0}

    probes = {"a": judging(50.0, calls), "b": failing}
    with pytest.raises(UserError, match="cannot read image 3"):
        train_tiny(tmp_path, probes=probes, probe_every=6)
    left = summary_of(tmp_path)
    assert left["finished"] and left["step"] == 12 and left["loss"] > 0
    assert left["a/top1"] == 50.0 and "b/top1" not in left
    assert read_metrics(tmp_path / "metrics.jsonl")[-1] == {"step": 12, "a/top1": 50.0}
    summary, _ = train_tiny(tmp_path, probes={**probes, "b": judging(70.0, calls)}, probe_every=6)
    assert calls == [6, 12, 12] and summary == {**left, "b/top1": 70.0}


def test_the_table_shows_the_first_figures_of_each_probe(tmp_path, capsys):
    """The file has all."""
    figures = {f"{probe}/{k}": 1.0 for probe in ("a", "b") for k in range(6)}
    write_summary(tmp_path, {"name": "x", "output_dir": "", "step": 3, **figures})
    told = capsys.readouterr().out
    assert all(f"{probe}/3" in told and f"{probe}/4" not in told for probe in ("a", "b"))
    assert "4 more in summary.json" in told
    assert summary_of(tmp_path).keys() >= figures.keys()


@pytest.mark.parametrize("most", [None, 5])
def test_a_command_with_no_step_left_keeps_every_figure(tmp_path, most, capsys):
    calls: list[int] = []
    probes = {"a": judging(50.0, calls)}
    train_tiny(tmp_path, probes=probes, recipe={"poison": (3,)}, max_steps=most)
    before, lines = summary_of(tmp_path), read_metrics(tmp_path / "metrics.jsonl")
    assert {"loss", "lr", "steps_per_second", "a/top1"} <= before.keys()
    capsys.readouterr()
    again, _ = train_tiny(tmp_path, probes={**probes, "b": judging(70.0)}, max_steps=most)
    assert again == summary_of(tmp_path) == {**before, "b/top1": 70.0}
    assert calls == [most or 12]  # what was judged is not judged again
    told = capsys.readouterr().out
    assert ("already at step 5 of 12" if most else "already finished at step 12") in told
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        *lines,
        {"step": most or 12, "b/top1": 70.0},
    ]


def test_what_trains_nothing_leaves_the_config(tmp_path, capsys):
    """And says of the keys that changed since that they have no effect."""
    train_tiny(tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    train_tiny(tmp_path, log_every=2)
    assert "WARNING" not in capsys.readouterr().out
    train_tiny(tmp_path, clip_grad=9.0, seed=1)
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == [
        "already finished at step 12",
        f"WARNING: without a step to train, changes have no effect in {tmp_path}: "
        "seed: 0 -> 1, training.clip_grad: 0.5 -> 9.0",
    ]
    assert (tmp_path / "config.yaml").read_text() == before
    assert not (tmp_path / "config.1.yaml").exists()


@pytest.mark.parametrize("changed", ["probes", "data"])
def test_a_probe_of_other_settings_or_images_judges_again(tmp_path, changed):
    calls: list[int] = []
    train_tiny(tmp_path, probes={"a": judging(50.0, calls)})
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    written[changed] = {"a": {"ks": [5]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    summary, _ = train_tiny(tmp_path, probes={"a": judging(60.0, calls)})
    assert calls == [12, 12] and summary["a/top1"] == 60.0


def test_a_run_that_ended_without_its_summary_gets_one_from_the_log(tmp_path):
    train_tiny(tmp_path, recipe={"poison": (3,)}, probes={"a": judging(50.0)})
    for name in ("summary.json", "exported/model.safetensors"):
        (tmp_path / name).unlink()
    summary, _ = train_tiny(tmp_path)
    assert summary["finished"] and summary["skipped_steps"] == 1
    assert summary["loss"] > 0 and summary["a/top1"] == 50.0
    assert (tmp_path / "exported/model.safetensors").is_file()


def test_seconds_and_skipped_steps_add_up(tmp_path):
    def slowly(step):
        time.sleep(0.1)

    first, _ = train_tiny(tmp_path, recipe={"on_step": slowly, "poison": (1,)}, max_steps=6)
    assert first["seconds"] >= 0.6 and first["skipped_steps"] == 1
    second, _ = train_tiny(tmp_path, recipe={"poison": (8,)})
    assert second["seconds"] >= first["seconds"] and second["skipped_steps"] == 2


def test_a_killed_attempt_counts_up_to_its_checkpoint(tmp_path):
    """Its seconds and its skipped steps: those behind it are made anew."""

    def die(step):
        time.sleep(0.1)
        if step == 8:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train_tiny(tmp_path, recipe={"on_step": die, "poison": (1, 7)}, every=6)
    assert any(math.isnan(line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl")[6:])
    summary, _ = train_tiny(tmp_path)
    assert summary["seconds"] >= 0.6 and summary["skipped_steps"] == 1


class Stumbling:
    """Batches of which every second one met an image that could not be read."""

    def __init__(self, batches: Iterator) -> None:
        self.batches, self.errors = batches, Counter()

    def __next__(self):
        batch = next(self.batches)
        self.errors["broken.png"] += int(batch["step"]) % 2
        return batch


def test_images_that_could_not_be_read_are_counted_over_all_starts(tmp_path, monkeypatch, capsys):
    """A killed start counts up to its checkpoint, though the loader had met more."""

    def die(step):
        if step == 9:
            raise RuntimeError("power cut")

    assert "unread_images" not in train_tiny(tmp_path / "whole")[0]
    batches = TinyRecipe.batches
    monkeypatch.setattr(TinyRecipe, "batches", lambda *given: Stumbling(batches(*given)))
    with pytest.raises(RuntimeError, match="power cut"):
        train_tiny(tmp_path / "run", recipe={"on_step": die}, every=6)
    stopped, _ = train_tiny(tmp_path / "run", max_steps=8)
    assert stopped["unread_images"] == 4
    capsys.readouterr()
    ended, _ = train_tiny(tmp_path / "run")
    assert ended["unread_images"] == summary_of(tmp_path / "run")["unread_images"] == 6
    assert "unread_images" in capsys.readouterr().out
    (tmp_path / "run/summary.json").unlink()
    assert train_tiny(tmp_path / "run")[0]["unread_images"] == 6  # no step is left


def test_the_summary_of_an_earlier_step_tells_nothing_of_a_later_one(tmp_path):
    """An attempt that is killed at its end leaves it: no figures and no values are taken over."""
    calls: list[int] = []
    probes = {"a": judging(50.0, calls)}
    train_tiny(tmp_path, probes=probes, max_steps=5)
    earlier = (tmp_path / "summary.json").read_text()
    train_tiny(tmp_path, probes=probes, max_steps=6)
    (tmp_path / "summary.json").write_text(earlier)
    summary, _ = train_tiny(tmp_path, probes=probes, max_steps=6)
    logged = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert calls == [5, 6, 6] and summary["loss"] == logged[5]
