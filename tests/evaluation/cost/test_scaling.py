"""The model of a step is its formulas: nothing is sent alone, and layouts rank as they should."""

import pytest

from evaluation.commands.scaling import main
from evaluation.cost.scaling import Cluster, Work, predict
from utils.communication import Part

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


def test_hybrid_spares_the_network():
    steps = {
        layout: predict(WORK, SLOW, layout, 256, batch=1024, most=32)
        for layout in ("replicate", "shard", "hybrid")
    }
    assert steps["hybrid"].send_s < steps["replicate"].send_s < steps["shard"].send_s
    waiting = predict(WORK, SLOW._replace(latency_us=10.0), "shard", 256, batch=1024, most=32)
    assert waiting.send_s > steps["shard"].send_s
    assert predict(WORK, FAST, "shard", 256, batch=1024, most=32).send_s < 1e-3


@pytest.mark.parametrize(
    "words",
    [
        ["--gpus", "6"],
        ["--gpus", "a"],
        ["--tflops", "0"],
        ["--config-file", "deit/quickstart.yaml"],
    ],
    ids=str,
)
def test_mistakes_are_told_in_one_line(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["model", *words])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_table(capsys):
    assert main(["model", "--gpus", "1,8", "--tflops", "50"]) == 0
    said = capsys.readouterr().out
    assert "model of a step: dinov2/hybrid_vith16.yaml" in said and "hybrid" in said
    assert "assumed: 50 TFLOP/s sustained per GPU" in said
