"""The model of a step is its formulas: nothing is sent alone, and layouts rank as they should."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.commands.scaling import main
from evaluation.cost import scaling, traffic
from evaluation.cost.scaling import Cluster, Work, parts_of, predict, work_of
from utils.communication import Part
from utils.config.build import plain
from utils.config.check import networks
from utils.config.compose import compose_config
from utils.flops import count_one_image

FAST = Cluster(4, 100.0, 1e9, 1e9, 0.0)
SLOW = Cluster(4, 100.0, 200.0, 12.5, 0.0)
WORK = Work(1e12, [Part(400_000_000, True), Part(400_000_000, False)], 34)


def test_one_gpu_computes_and_sends_nothing():
    step = predict(WORK, SLOW, "replicate", 1, batch=1024, most=32)
    assert (step.send_s, step.micro_batches) == (0, 32)
    assert step.compute_s == pytest.approx(10.24) == step.together_s == step.apart_s


def test_replicated_sends_the_gradients_twice_around():
    step = predict(WORK, SLOW, "replicate", 32, batch=1024, most=32)
    assert step.send_s == pytest.approx(2 * 31 / 32 * 4 * 4e8 / 12.5e9)
    assert step.compute_s == pytest.approx(0.32) and step.micro_batches == 1


def test_sharded_sends_bf16_parameters_three_times_and_sums_float32():
    step = predict(WORK, SLOW, "shard", 4, batch=128, most=32)
    assert step.send_s == pytest.approx(3 / 4 * (2 * 3 + 4) * 4e8 / 200e9)
    assert predict(WORK, SLOW, "hybrid", 4, batch=128, most=32).send_s == step.send_s


def test_hybrid_sends_within_a_node_and_shards_over_the_network():
    """On 8 nodes of 4, in each of 2 micro-batches: as a sharded node, then a quarter over 8."""
    step = predict(WORK, SLOW, "hybrid", 32, batch=1024, most=16)
    node = 3 / 4 * (2 * 3 + 4) * 4e8 / 200e9
    assert step.micro_batches == 2
    assert step.send_s == pytest.approx(2 * (node + 2 * 7 / 8 * 4 * 4e8 / 4 / 12.5e9))


@pytest.mark.parametrize(
    ("layout", "rounds"),
    [
        ("replicate", 2 * 31),  # an all-reduce goes around twice, once a step
        ("shard", 2 * (3 + 1) * 31),  # two micro-batches: gathered three times, reduced once
        ("hybrid", 2 * ((3 + 1) * 3 + 2 * 7)),  # among four, and over eight nodes
    ],
)
def test_a_message_of_each_unit_waits_for_every_hop_of_the_ring(layout, rounds):
    steps = [
        predict(WORK, SLOW._replace(latency_us=wait), layout, 32, batch=1024, most=16)
        for wait in (0.0, 10.0)
    ]
    assert steps[1].send_s - steps[0].send_s == pytest.approx(rounds * 34 * 10e-6)


def test_hybrid_spares_the_network():
    steps = {
        layout: predict(WORK, SLOW, layout, 256, batch=1024, most=32)
        for layout in ("replicate", "shard", "hybrid")
    }
    assert steps["hybrid"].send_s < steps["replicate"].send_s < steps["shard"].send_s
    waiting = predict(WORK, SLOW._replace(latency_us=10.0), "shard", 256, batch=1024, most=32)
    assert waiting.send_s > steps["shard"].send_s
    assert predict(WORK, FAST, "shard", 256, batch=1024, most=32).send_s < 1e-3


@pytest.mark.parametrize("again", [False, True])
def test_the_work_of_a_step_is_that_of_student_and_teacher(again, tmp_path):
    """Forward and twice that backward on all crops, the teacher's forward on the global ones."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "defaults: [/dinov2/quickstart, _self_]\n"
        f"training: {{activation_checkpointing: {str(again).lower()}}}\n"
    )
    work, images = work_of(str(file))
    config = plain(compose_config(str(file)))
    net, recipe = networks(config)
    large, small = (
        count_one_image(net, size, backward=False).forward
        for size in (recipe.crops.global_crops_size, recipe.crops.local_crops_size)
    )
    student = 2 * large + recipe.crops.local_crops_number * small
    passes = 4 if again else 3  # the forward pass once more, where it is recomputed
    assert work.operations_per_image == passes * student + 2 * large
    backbone = sum(p.numel() for p in net.parameters())
    for trained in (True, False):
        assert sum(part.parameters for part in work.parts if part.trained == trained) > backbone
    assert work.num_units == len(net.blocks) + len(recipe.student)
    assert images == config["recipe"]["batch_size_per_gpu"]


def test_parts_are_those_that_the_recipe_gives_to_the_loop():
    """Besides modules without parameters, which nobody sends."""
    recipe = networks(plain(compose_config("dinov2/quickstart.yaml", scaling.SMALL)))[1]
    parts, given = parts_of(recipe), []

    def wrap(module, units=()):
        parameters = list(module.parameters())
        if size := sum(p.numel() for p in parameters):
            given.append(Part(size, any(p.requires_grad for p in parameters)))
        return module

    recipe.parallelize(wrap)
    assert parts == given and len(parts) >= 4


def test_the_measured_stands_beside_the_formula(monkeypatch):
    """Of what is neither measured nor expected there is no row."""
    monkeypatch.setattr(scaling, "NETS", {"plain": scaling.NETS["plain"]})
    sent = {"all_gather": 0, "reduce_scatter": 0, "all_reduce": 7e6, "broadcast": 1}
    monkeypatch.setattr(traffic, "measure", lambda configs, count: [sent] * len(configs))
    rows = scaling.measured([2])
    kinds = ["all_reduce", "all_gather", "reduce_scatter", "all_reduce"]
    assert [row[:4] for row in rows] == [
        ["plain", 2, layout, kind]
        for layout, kind in zip(["replicate", *["shard"] * 3], kinds, strict=True)
    ]
    assert all(row[4] == "7,000,000" for row in rows if row[3] == "all_reduce")


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def show(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(scaling, "show", show)
    with pytest.raises(SystemExit) as caught:
        main(["model"])
    assert caught.value.code == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "words",
    [
        ["--gpus", "6"],
        ["--gpus", "a"],
        ["--tflops", "0"],
        ["--tflops", "nan"],
        ["--latency-us", "inf"],
        ["--gpus-per-node", "0"],
        ["--nodes", "2"],
        ["--config-file", "deit/quickstart.yaml"],
    ],
    ids=str,
)
def test_mistakes_are_told_in_one_line(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["model", *words])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model", "--processes", "9"], "--processes is for measure; model does not read it"),
        (["measure", "--gpus=1"], "--gpus is for model; measure does not read it"),
        (["measure", "model"], "unrecognized arguments: model"),
        (["measure", "--processes", "1"], "--processes must be a whole number from 2, not 1"),
    ],
)
def test_a_flag_of_the_other_word_is_refused(words, said, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert said in capsys.readouterr().err


def test_the_table(capsys):
    assert main(["model", "--gpus", "1,8", "--tflops", "50"]) == 0
    said = capsys.readouterr().out
    assert "model of a step: dinov2/hybrid_vith16.yaml" in said and "hybrid" in said
    assert "assumed: 50 TFLOP/s sustained per GPU" in said
    # One GPU loses nothing, eight only what they cannot send while they compute.
    assert said.count("100 to 100") == 1 and said.count("100 to ") == 4


def test_a_failure_is_told_in_the_words_of_the_rank():
    """Not by the last line of torchrun's report, which is a rule."""
    report = "Failures:\n  traceback : Signal 15\n=====\n"
    errors = f"[rank0]: Traceback:\n[rank0]: utils.errors.UserError: masks: too few\n{report}"
    assert traffic._reason(errors) == "UserError: masks: too few"
    assert traffic._reason(report) == "traceback : Signal 15"
    assert traffic._reason("") == "?"


def test_nothing_runs_on_after_a_signal(tmp_path):
    """What torchrun starts has a session of its own; only torchrun can end it."""
    code = f"""
import os, signal, sys
from evaluation.cost import traffic
child = "import os, time; open({str(tmp_path / "pid")!r}, 'w').write(str(os.getpid())); " \
    "os.kill(os.getppid(), {signal.SIGTERM:d}); time.sleep(60)"
traffic._run([sys.executable, "-c", child], dict(os.environ))
"""
    root = Path(traffic.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
