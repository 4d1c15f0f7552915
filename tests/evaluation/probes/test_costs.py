"""The model of what probes cost: its laws, and the real code held against it."""

import pytest

from evaluation.probes import measure as measurements
from evaluation.probes import plan as command
from evaluation.probes.costs import MODELS, Plan, Rates, knn_costs, linear_costs
from evaluation.probes.measure import measure, measure_rates
from utils.errors import UserError

RATES = Rates(gemm_flops=1e12, topk_numbers=1e9, merged_rows=1e5, bytes_moved=1e11, losses=1e9)
IMAGENET = Plan(processes=8)


def test_no_process_holds_all_features():
    """Rows are shared out; on the device lie two chunks of them and megabytes of votes."""
    costs = knn_costs(IMAGENET, RATES)
    parts = {part.what: part for part in costs.parts}
    all_features = 1_281_167 * 1280 * 4
    rows = parts["training rows of this process"]
    assert rows.host == pytest.approx(all_features / 8, rel=1e-4)
    assert rows.device == 0
    assert costs.device < all_features / 3
    assert parts["votes of a block"].device < 25e6


def test_processes_share_the_work():
    one, eight = (knn_costs(Plan(processes=w), RATES).seconds for w in (1, 8))
    assert one["products"] == pytest.approx(8 * eight["products"], rel=1e-4)
    trained = [linear_costs(Plan(processes=w), RATES).seconds for w in (1, 8)]
    name = "products of the training"
    assert trained[0][name] == pytest.approx(8 * trained[1][name])


def test_linear_is_three_times_its_heads():
    """52 heads on 1, 2, 4 and 5 times the width, each once more as gradient and as momentum."""
    parts = {part.what: part.device for part in linear_costs(IMAGENET, RATES).parts}
    heads = 13 * 1000 * 12 * 1280 + 52 * 1000
    assert parts["heads"] == parts["gradients"] == parts["momentum"] == 4 * heads


@pytest.mark.parametrize("probe", MODELS)
def test_on_a_cpu_everything_is_host_memory(probe):
    costs = MODELS[probe](IMAGENET._replace(device="cpu", processes=1), RATES)
    assert costs.device == 0
    assert costs.host > 1e9


def test_precision_halves_what_is_searched():
    full, half = (
        knn_costs(IMAGENET._replace(search_precision=p), RATES).parts[0] for p in ("fp32", "fp16")
    )
    assert full.host == 2 * half.host


@pytest.mark.slow
@pytest.mark.parametrize(
    ("probe", "plan"),
    [
        ("knn", Plan(train=100_000, val=2000, dim=256, classes=50, device="cpu")),
        (
            "linear",
            Plan(val=128, dim=768, classes=1000, steps=2, global_batch_size=256, device="cpu"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_real_memory_is_near_the_model(probe, plan):
    """Within a quarter, or the 30 MB that torch's own buffers take at such sizes."""
    plan = plan._replace(evaluations=1)
    model, found = MODELS[probe](plan, RATES).host, measure(probe, plan)
    assert abs(found.bytes - model) < max(0.25 * model, 30e6)
    assert found.seconds > 0


def test_command_prints_model_and_measurement(capsys, monkeypatch):
    monkeypatch.setattr(measurements, "measure_rates", lambda probe, plan: RATES)
    command.main(["--probe", "knn", "--processes", "8", "--device", "cuda"])
    printed = capsys.readouterr().out
    assert "knn, one of 8 processes on cuda: 1,281,167 + 50,000 images" in printed
    assert "by the model" in printed and "measured on this machine's" in printed


@pytest.mark.slow
def test_rates_are_measured():
    plan = Plan(train=500, val=10, dim=8, classes=5, batch_size=4, device="cpu")
    for probe in MODELS:
        assert min(measure_rates(probe, plan)) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--probe", "kn"], "did you mean 'knn'"),
        (["--train", "0"], "--train must be a whole number from 1, not 0"),
        (["--ks", "5", "-1"], "--ks must be a whole number from 1, not -1"),
        (["--batch-size", "0"], "--batch-size must be a whole number from 1, not 0"),
        (["--dim", "wide"], "invalid int value: 'wide'"),
        (["--search-precision", "fp8"], "fp32 or fp16"),
        (["--device", "tpu"], "cpu or cuda, not 'tpu'"),
    ],
)
def test_mistakes_are_one_line(words, message):
    with pytest.raises(UserError, match=message):
        command.read_plan(words)


def test_only_one_process_on_a_cpu_is_measured():
    with pytest.raises(UserError, match="add --processes 1"):
        measure("knn", IMAGENET)
