"""The loop's promises: exact resume, accumulation, NaN stop, several processes, run folder."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.utils.loop_case import TinyRecipe, parts_of, train_tiny, train_together
from utils.errors import UserError
from utils.metrics_file import read_metrics
from utils.signals import STOP_SIGNALS

TIMES = {"steps_per_second", "images_per_second", "waited_for_data", "memory_gb"}


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Drawing takes longer than training here; one test looks at the picture."""
    if request.node.name != "test_run_folder":
        monkeypatch.setattr("utils.metrics.draw_curves", lambda path: None)


def metrics_of(folder: Path) -> list[dict[str, float]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return parts_of(folder)["recipe"]


def assert_same(ours: Path, theirs: Path, *, tolerance: float = 0.0) -> None:
    """Same weights and same metrics, bit for bit unless a tolerance is given."""
    left, right = weights_of(ours), weights_of(theirs)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance)
    first, second = metrics_of(ours), metrics_of(theirs)
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert math.isclose(one[key], other[key], rel_tol=tolerance, abs_tol=tolerance), key


PLAIN = {"dropout": 0.0, "accumulation": 2}  # what does not depend on the number of processes


@pytest.fixture(scope="module")
def company(tmp_path_factory) -> Path:
    """Folders trained by two processes: <sharding>/{whole,stopped} and random/{whole,stopped}."""
    folder, runs = tmp_path_factory.mktemp("company"), []
    for name, options in {
        "replicate": {"recipe": PLAIN, "sharding": "replicate", "log_every": 1},
        "shard": {"recipe": PLAIN, "sharding": "shard", "log_every": 1},
        "random": {},
    }.items():
        runs.append((f"{folder}/{name}/whole", options))
        runs.append((f"{folder}/{name}/stopped", {**options, "max_steps": 5}))
        runs.append((f"{folder}/{name}/stopped", options))
    train_together(2, runs)
    return folder


@pytest.mark.parametrize("accumulation", [1, 3])
def test_resume_at_any_step_is_exact(tmp_path, accumulation):
    recipe = {"accumulation": accumulation}
    train_tiny(tmp_path / "whole", recipe=recipe)
    for stop in (1, 6, 11):
        folder = tmp_path / f"stopped_{stop}"
        summary, _ = train_tiny(folder, recipe=recipe, max_steps=stop)
        assert summary["step"] == stop and not summary["finished"]
        torch.rand(100)  # the process that resumes has another history
        train_tiny(folder, recipe=recipe)
        assert_same(folder, tmp_path / "whole")


@pytest.mark.parametrize("judged", ["teacher", "student"])
def test_probes_logs_and_saves_do_not_change_the_training(tmp_path, monkeypatch, judged):
    """Also where the network that is judged is the one that is trained, with dropout."""
    monkeypatch.setattr(TinyRecipe, "exported", property(lambda recipe: getattr(recipe, judged)))

    def probe(net, *, data, output_dir, step):
        assert not any(part.training for part in net.modules()) and not torch.is_grad_enabled()
        return {"draw": torch.rand(()).item()}

    train_tiny(tmp_path / "plain")
    summary, _ = train_tiny(
        tmp_path / "watched", probes={"p": probe}, probe_every=5, every=2, log_every=1
    )
    left, right = weights_of(tmp_path / "plain"), weights_of(tmp_path / "watched")
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert "p/draw" in summary
    probed = [line["step"] for line in metrics_of(tmp_path / "watched") if "p/draw" in line]
    assert probed == [5, 10, 12]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_finishes_the_step_saves_and_resumes_exactly(tmp_path, number):
    def on_step(step):
        if step == 4:
            os.kill(os.getpid(), number)

    train_tiny(tmp_path / "whole")
    summary, _ = train_tiny(tmp_path / "told", recipe={"on_step": on_step})
    assert (summary["step"], summary["finished"]) == (5, False)
    train_tiny(tmp_path / "told")
    assert_same(tmp_path / "told", tmp_path / "whole")


@pytest.mark.parametrize("kept", ["every step", "the end"])
def test_a_probe_comes_after_the_checkpoint_and_is_made_up(tmp_path, kept):
    """An error in it costs no step, also at the last one; the next start has its figures."""
    at = 4 if kept == "every step" else 12

    def probe(net, *, data, output_dir, step):
        if step == at and broken:
            assert (tmp_path / "probed/checkpoints/last").read_text() == f"{at}\n"
            raise RuntimeError("a fault in the probe")
        return {"draw": torch.rand(()).item()}

    options = {"probe_every": 4, "every": 4 if kept == "every step" else 0}
    broken = True
    with pytest.raises(RuntimeError, match="a fault in the probe"):
        train_tiny(tmp_path / "probed", probes={"p": probe}, **options)
    broken = False
    train_tiny(tmp_path / "probed", probes={"p": probe}, **options)
    train_tiny(tmp_path / "whole", probes={"p": probe}, **options)
    probed = [line["step"] for line in metrics_of(tmp_path / "probed") if "p/draw" in line]
    assert probed == [4, 8, 12]
    if kept == "every step":
        assert_same(tmp_path / "probed", tmp_path / "whole")


def test_a_run_told_to_leave_does_not_probe_first(tmp_path):
    told, probed = [3], []

    def on_step(step):
        if step in told:
            told.clear()
            os.kill(os.getpid(), signal.SIGTERM)

    def probe(net, *, data, output_dir, step):
        probed.append(step)
        return {"figure": 1.0}

    options = {"probes": {"p": probe}, "probe_every": 4, "recipe": {"on_step": on_step}}
    assert train_tiny(tmp_path, **options)[0]["step"] == 4 and probed == []
    assert train_tiny(tmp_path, **options)[0]["finished"] and probed == [4, 8, 12]
    train_tiny(tmp_path / "2", **options | {"max_steps": 8})
    probed.clear()
    train_tiny(tmp_path / "2", **options)
    assert probed == [12], "what has its figures is not probed again"


def test_a_crash_resumes_from_the_checkpoint_without_double_lines(tmp_path):
    def crash(step):
        if step == 10:
            raise RuntimeError("power cut")

    train_tiny(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        train_tiny(tmp_path / "crashed", recipe={"on_step": crash}, every=3, log_every=2)
    assert metrics_of(tmp_path / "crashed")[-1]["step"] == 10
    summary, _ = train_tiny(tmp_path / "crashed", every=3)
    assert_same(tmp_path / "crashed", tmp_path / "whole")


def test_accumulation_equals_the_big_batch(tmp_path):
    train_tiny(tmp_path / "big", recipe={"dropout": 0.0})
    train_tiny(tmp_path / "small", recipe={"dropout": 0.0, "accumulation": 4})
    left, right = weights_of(tmp_path / "big"), weights_of(tmp_path / "small")
    for name in left.keys() - {"centre"}:  # the centre moves with every micro-batch
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-6)
    # AdamW and clipping alone would hide gradients that are too large by a factor.
    for one, other in zip(*(metrics_of(tmp_path / name) for name in ("big", "small")), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("sharding", ["replicate", "shard"])
def test_two_processes_equal_one(tmp_path, company, sharding):
    train_tiny(tmp_path / "one", recipe=PLAIN)
    two = company / sharding / "whole"
    left, right = weights_of(tmp_path / "one"), weights_of(two)
    for name in left.keys() - {"centre"}:  # every rank has its own centre
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-6)
    for one, other in zip(metrics_of(tmp_path / "one"), metrics_of(two), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    # One process continues what two began.
    shutil.copytree(two, tmp_path / "two")
    summary, _ = train_tiny(tmp_path / "two", recipe={**PLAIN, "total_steps": 14})
    assert summary["step"] == 14


@pytest.mark.parametrize("name", ["replicate", "shard", "random"])
def test_two_processes_resume_exactly(company, name):
    assert_same(company / name / "stopped", company / name / "whole")


def test_each_rank_has_a_dropout_of_its_own(company):
    first, second = parts_of(company / "random" / "whole")["progress"]["random"]
    assert not torch.equal(first["torch"], second["torch"])


def test_one_bad_step_is_skipped_without_a_trace(tmp_path):
    summary, _ = train_tiny(tmp_path / "a", recipe={"poison": (5,)})
    assert summary["skipped_steps"] == 1 and summary["step"] == 12
    lines = metrics_of(tmp_path / "a")
    assert math.isnan(lines[5]["loss"]) and not math.isnan(lines[6]["loss"])
    assert '"loss": null' in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[5]
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "a").values())

    train_tiny(tmp_path / "b", recipe={"poison": (5,)}, max_steps=5)
    before = weights_of(tmp_path / "b")
    train_tiny(tmp_path / "b", recipe={"poison": (5,)}, max_steps=6)
    after = weights_of(tmp_path / "b")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bad_steps_in_a_row_end_the_run_and_keep_the_state(tmp_path):
    expected = r"not finite at step 6, 7 \(loss=nan.*checkpoints/5"
    with pytest.raises(UserError, match=expected):
        train_tiny(tmp_path / "run", recipe={"poison": tuple(range(5, 12))})
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "run").values())
    summary, _ = train_tiny(tmp_path / "run")  # without the poison it goes on from there
    assert summary["step"] == 12
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == list(range(1, 13))


def test_a_disk_that_fills_up_behind_the_last_checkpoint_is_one_line(tmp_path):
    def full(net, *, data, output_dir, step):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device; .* of step 12 stays") as caught:
        train_tiny(tmp_path, probes={"p": full})
    assert "\n" not in str(caught.value)
    summary, _ = train_tiny(tmp_path)
    assert summary["finished"]


@pytest.mark.parametrize("fits", [True, False])
def test_a_last_save_that_fails_leaves_the_network_if_it_fits(tmp_path, monkeypatch, capsys, fits):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.checkpoints.shards.save_file", full)
    if not fits:
        monkeypatch.setattr("utils.run_end.export_weights", full)
    with pytest.raises(UserError, match="^checkpoint of step 12 not written") as caught:
        train_tiny(tmp_path, every=3, log_every=5)
    assert caught.type is UserError  # by its name slurm/local.py finds the line
    line, exported = str(caught.value), tmp_path / "exported/model.safetensors"
    assert "\n" not in line and exported.is_file() == fits
    assert line.endswith(
        f"the network alone, of step 12, is {exported}" if fits else "No space left on device"
    )
    told = capsys.readouterr().out
    assert [told.count(f"checkpoint of step {step} not") for step in (3, 6, 9, 12)] == [1, 1, 1, 0]


def test_fp16_scaler_state_is_saved_and_an_overflow_is_not_counted(tmp_path):
    train_tiny(tmp_path, precision="fp16", max_steps=4)
    assert parts_of(tmp_path)["progress"]["scaler"]["_growth_tracker"] == 4
    train_tiny(tmp_path, precision="fp16", max_steps=6)
    assert parts_of(tmp_path)["progress"]["scaler"]["_growth_tracker"] == 6


def test_fp16_takes_the_steps_of_fp32(tmp_path):
    """What is clipped, logged and applied are the true gradients, not the scaled ones."""
    options = {"optimizer": torch.optim.SGD, "recipe": {"dropout": 0.0}, "max_steps": 6}
    train_tiny(tmp_path / "half", precision="fp16", **options)
    train_tiny(tmp_path / "full", **options)
    assert_same(tmp_path / "half", tmp_path / "full", tolerance=2e-3)


def test_overflows_of_fp16_halve_the_scale_until_gradients_fit(tmp_path, monkeypatch):
    """However many steps in a row that takes: they are skipped, and the run goes on."""
    quiet = TinyRecipe.losses

    def loud(recipe, batch, step):
        return {name: 1000 * loss for name, loss in quiet(recipe, batch, step).items()}

    monkeypatch.setattr(TinyRecipe, "losses", loud)
    summary, _ = train_tiny(tmp_path, precision="fp16", nan_patience=2)
    scaler, skipped = parts_of(tmp_path)["progress"]["scaler"], summary["skipped_steps"]
    assert summary["finished"] and 2 < skipped < 12
    assert scaler["scale"] == 2.0 ** (16 - skipped)
    assert scaler["_growth_tracker"] == 12 - skipped


def test_a_run_may_change_to_fp16_and_back(tmp_path):
    scalers = []
    for last, precision in (2, "fp32"), (4, "fp16"), (6, "fp32"):
        train_tiny(tmp_path, precision=precision, max_steps=last)
        scalers.append(parts_of(tmp_path)["progress"]["scaler"])
    assert scalers[0] == scalers[2] == {} and scalers[1]["_growth_tracker"] == 2


def test_bf16_and_recomputation_train(tmp_path):
    summary, _ = train_tiny(tmp_path / "a", precision="bf16", activation_checkpointing=True)
    assert summary["finished"]
    train_tiny(tmp_path / "b", activation_checkpointing=True)
    train_tiny(tmp_path / "c")
    left, right = weights_of(tmp_path / "b"), weights_of(tmp_path / "c")
    for name in left:
        torch.testing.assert_close(left[name], right[name])


def test_run_folder(tmp_path):
    summary, recipe = train_tiny(tmp_path)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["training"]["clip_grad"] == 0.5
    assert "torch" in (tmp_path / "git.txt").read_text()
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    exported = load_file(tmp_path / "exported/model.safetensors")
    for name, value in recipe.teacher.state_dict().items():
        assert torch.equal(exported[name], value)
    line = metrics_of(tmp_path)[0]
    assert {
        "step",
        "loss",
        "fit",
        "lr",
        "weight_decay",
        "grad_norm/student",
        "grad_norm/head",
    } <= line.keys()
    assert line["lr"] == 1e-2 and line["last_layer_lr"] == 0.0


def test_a_changed_config_is_reported_and_the_old_one_kept(tmp_path, capsys):
    train_tiny(tmp_path, max_steps=3)
    capsys.readouterr()
    train_tiny(tmp_path, max_steps=5, log_every=1)
    assert "WARNING" not in capsys.readouterr().out
    train_tiny(tmp_path, clip_grad=9.0)
    assert "training.clip_grad: 0.5 -> 9.0" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "config.1.yaml").read_text())["training"]["clip_grad"] == 0.5


def test_a_refused_command_leaves_the_config_as_it_was(tmp_path):
    """What is beside the checkpoints says how they were made."""
    train_tiny(tmp_path, max_steps=2)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(UserError, match="max_steps"):
        train_tiny(tmp_path, max_steps=0, clip_grad=9.0)
    assert (tmp_path / "config.yaml").read_text() == before
    assert not (tmp_path / "config.1.yaml").exists()


def test_resume_false_refuses_a_used_folder(tmp_path):
    train_tiny(tmp_path, max_steps=2)
    with pytest.raises(UserError, match="holds a run at step 2"):
        train_tiny(tmp_path, resume=False)


def test_given_weights_start_a_run_and_a_checkpoint_precedes_them(tmp_path):
    train_tiny(tmp_path / "first")
    train_tiny(tmp_path / "second", weights=str(tmp_path / "first"), max_steps=1)
    start, end = weights_of(tmp_path / "first"), weights_of(tmp_path / "second")
    assert (start["head.weight"] - end["head.weight"]).abs().max() < 0.05
    with pytest.raises(UserError, match="there is no"):
        train_tiny(tmp_path / "third", weights="nowhere.pth")


def test_a_parameter_without_a_group_is_named(tmp_path):
    class Forgetful(TinyRecipe):
        def param_groups(self):
            return super().param_groups()[:2]

    from utils.optimizers import make_optimizer

    recipe = Forgetful()
    with pytest.raises(UserError, match=r"head\.weight"):
        make_optimizer(torch.optim.AdamW, recipe.param_groups(), recipe)
