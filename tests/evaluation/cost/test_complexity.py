"""The command from flags to table, JSON and picture."""

import json
import sys
from functools import partial

import pytest
import torch
from torch import nn

from evaluation.commands.complexity import parse_complexity, read_complexity_arguments
from evaluation.cost import complexity, settings
from evaluation.cost.complexity import measure
from evaluation.cost.peaks import measure_peak
from evaluation.cost.timing import INFERENCE, TRAINING, Turn
from tests.evaluation.toys import in_processes
from utils.errors import UserError

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8}
HYBRID, PLAIN = "hybrid_deit_small_patch16", "deit_small_patch16_LS"
HEADLESS, HEADLESS_PLAIN = "hybrid_dinov2_vit_small_patch16", "dinov2_vit_small_patch16"


@pytest.fixture(autouse=True)
def peak_of_a_moment(monkeypatch):
    """A small product instead of three seconds of large ones."""
    quick = partial(measure_peak, size=64, budget_s=0.0)
    monkeypatch.setattr(complexity, "find_peak", quick)


def tiny(*words, models=HYBRID):
    """A config of small nets on small images."""
    argv = ["--models", models, "--size", "32", "--batch-size", "2", "--device", "cpu", *words]
    config = parse_complexity(argv)
    for name in (HYBRID, PLAIN, HEADLESS, HEADLESS_PLAIN):
        config["keywords"][name] = SMALL
    return config


def test_table_json_and_picture(tmp_path, capsys):
    files = ["--json", str(tmp_path / "a" / "c.json"), "--picture", str(tmp_path / "c.png")]
    results = measure(tiny(*files, "--operators", models=f"{HYBRID},{HEADLESS}"))
    assert list(results) == [PLAIN, HYBRID, HEADLESS_PLAIN, HEADLESS]
    found = json.loads((tmp_path / "a" / "c.json").read_text())
    protocol, hybrid, plain = found["protocol"], found["models"][HYBRID], found["models"][PLAIN]
    for key in ("device", "torch", "code", "command", "date", "peak_flops", "peak_source"):
        assert protocol[key], key
    assert hybrid["twin"] == PLAIN and plain["twin"] is None
    for kind in (INFERENCE, TRAINING):
        figures = hybrid["passes"][kind]
        ratio = figures["times_the_twin"]
        assert 0 < ratio["least"] <= ratio["median"] <= ratio["greatest"]
        assert figures["mfu"] > 0 and plain["passes"][kind]["times_the_twin"] is None
        operations = hybrid["multiply_adds" if kind == INFERENCE else "training_multiply_adds"] * 2
        rate = figures["images_per_second"] * operations / protocol["peak_flops"]
        assert figures["mfu"] == pytest.approx(rate)
    assert hybrid["operators"]["forward_calls"] > plain["operators"]["forward_calls"] > 0
    assert (tmp_path / "c.png").stat().st_size > 1000
    out = capsys.readouterr().out
    assert "by default on this device: steps 3, warmup 2, rounds 3" in out
    assert "depth=2" in out and "best rate of a product" in out and "protocol: 32 x 32" in out


def test_a_picture_tells_its_protocol_and_starts_at_nothing(tmp_path, monkeypatch, capsys):
    drawn = []
    keep = lambda self, *_, **__: drawn.append(self)  # noqa: E731
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", keep)
    words = ["--no-training", "--steps", "1", "--rounds", "2", "--warmup", "0"]
    measure(tiny(*words, "--picture", str(tmp_path / "c.png")))
    (axis,) = drawn[0].axes
    assert axis.get_ylim()[0] == 0
    assert "images of 32 x 32, batch 2, fp32, eager" in axis.get_title()
    assert "rounds: 1, not 2: each needs a timed step" in capsys.readouterr().out


def test_each_net_has_images_of_its_own_size_and_channels(monkeypatch, capsys, tmp_path):
    """A column and a title say so."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    shapes, titles = [], []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda _, text, **__: titles.append(text))

    def turns(contestants, kind, **_):
        shapes.extend(tuple(c.images.shape) for c in contestants.values())
        return {name: [Turn([1.0], None)] for name in contestants}, []

    monkeypatch.setattr(complexity, "measure_in_turn", turns)
    words = ["--no-training", "size=null", "--picture", str(tmp_path / "c.png")]
    config = tiny(*words, models="posthoc_vit_mnist,posthoc_vit_pcam")
    results = measure(config)
    assert shapes == [(2, 1, 28, 28), (2, 3, 96, 96)]
    assert [result.size for result in results.values()] == [28, 96]
    out = capsys.readouterr().out
    assert "a side" in out and "protocol: each net at its own size" in out
    assert "each net at its own size, batch 2" in titles[0]
    measure({**config, "models": ["posthoc_vit_pcam"], "passes": [], "picture_file": None})
    out = capsys.readouterr().out
    assert "a side" not in out and "protocol: 96 x 96 pixels" in out


def test_of_a_size_all_tells_whom_it_leaves_out(monkeypatch, capsys):
    names = ["posthoc_vit_pcam", "swag_vit_b16_in1k"]
    monkeypatch.setattr("evaluation.cost.models.backbone_names", lambda: names)
    assert list(measure(tiny("--check", "--size", "96", models="all"))) == names[:1]
    said = "left out, as they are for images of another size: swag_vit_b16_in1k\n"
    assert said in capsys.readouterr().out


def test_counts_alone_time_nothing(monkeypatch, capsys):
    monkeypatch.setattr(complexity, "measure_in_turn", None)
    results = measure(tiny("--check"))
    assert all(not result.speeds for result in results.values())
    assert "images/s" not in capsys.readouterr().out


def test_one_pass_alone():
    results = measure(tiny("--no-training", "--steps", "1"))
    assert all(list(result.speeds) == [INFERENCE] for result in results.values())


def test_operators_are_counted_in_eager_mode(monkeypatch, capsys):
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda unit: original(unit, backend="aot_eager"))
    words = ["--operators", "--no-training", "--steps", "1"]
    eager, compiled = (measure(tiny(*words, *more)) for more in ([], ["--compile"]))
    assert eager[HYBRID].operators == compiled[HYBRID].operators
    out = capsys.readouterr().out
    assert "fp32, eager" in out and "fp32, compiled" in out


def test_an_interrupt_keeps_table_and_json_of_what_was_measured(tmp_path, monkeypatch, capsys):
    measure_pass = complexity.measure_in_turn

    def interrupted(contestants, kind, **more):
        if kind == TRAINING:
            raise KeyboardInterrupt
        return measure_pass(contestants, kind, **more)

    monkeypatch.setattr(complexity, "measure_in_turn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(tiny("--json", str(tmp_path / "c.json")))
    for net in json.loads((tmp_path / "c.json").read_text())["models"].values():
        assert list(net["passes"]) == [INFERENCE] and net["passes"][INFERENCE]["mfu"] > 0
    told, table = capsys.readouterr().out.split("cost of a net")
    assert f"{PLAIN}: inference, " in told and "times the twin's" in told.splitlines()[-1]
    assert HYBRID in table and "protocol: 32 x 32" in table


@pytest.mark.parametrize("failing", [HYBRID, PLAIN])
def test_out_of_memory_of_one_leaves_the_others(failing, monkeypatch, capsys):
    def turns(contestants, kind, **_):
        left = {name: [Turn([1.0], None)] for name in contestants if name != failing}
        return left, [failing]

    monkeypatch.setattr(complexity, "measure_in_turn", turns)
    results = measure(tiny())
    assert results[failing].lost == [INFERENCE, TRAINING]
    assert not results[HYBRID].ratios, "nothing to be held against"
    assert "out of memory" in capsys.readouterr().out


def test_speeds_and_ratios_are_those_of_the_turns(monkeypatch):
    """A net of half the seconds is twice as fast as its twin, at the batch and precision asked."""
    seconds, asked = {PLAIN: 1.0, HYBRID: 0.5}, []

    def turns(contestants, kind, **more):
        asked.append((kind, more, {(c.images.shape, c.dtype) for c in contestants.values()}))
        return {name: [Turn([seconds[name]], None)] for name in contestants}, []

    monkeypatch.setattr(complexity, "measure_in_turn", turns)
    monkeypatch.setattr(settings, "has_bfloat16", lambda device: True)
    words = ["--steps", "7", "--rounds", "4", "--warmup", "5", "--amp"]
    results = measure(tiny(*words))
    lengths, nets = {"steps": 7, "rounds": 4, "warmup": 5}, {((2, 3, 32, 32), torch.bfloat16)}
    assert asked == [(kind, lengths, nets) for kind in (INFERENCE, TRAINING)]
    for kind in (INFERENCE, TRAINING):
        assert results[HYBRID].ratios[kind] == (2, 2, 2)
        rates = [results[name].speeds[kind].images_per_second for name in (PLAIN, HYBRID)]
        assert rates == [2 / 1.0, 2 / 0.5]


def test_bfloat16_that_a_cpu_has_not_is_told_and_left_out(monkeypatch, capsys):
    monkeypatch.setattr(settings, "has_bfloat16", lambda device: False)
    measure(tiny("--amp", "--no-training", "--steps", "1"))
    out = capsys.readouterr().out
    assert "--amp has no effect" in out and "batch 2, fp32, eager" in out


def test_accuracy_is_drawn_for_those_that_have_one(tmp_path):
    words = ["--check", "--picture", str(tmp_path / "a.svg"), "--picture-y", "accuracy"]
    config = tiny(*words, models="hybrid_deit_large_patch16,hybrid_deit_huge_patch14")
    for name in ("deit_large_patch16_LS", "deit_huge_patch14_LS", *config["models"]):
        config["keywords"][name] = SMALL
    measure(config)
    assert (tmp_path / "a.svg").stat().st_size > 1000
    with pytest.raises(UserError, match="none of these nets has a published accuracy"):
        measure(tiny(*words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", "0"], "batch_size must be a whole number from 1, not 0"),
        (["--steps", "many"], "steps must be a whole number from 1, not 'many'"),
        (["--threads", "0"], "threads must be a whole number from 1, not 0"),
        (["--threads", "all"], "threads must be a whole number from 1, not 'all'"),
        (["passes=[foo]"], "passes must be one of inference, training step, not 'foo'"),
        (["--picture", "a.gif"], "must end in .png, .pdf, .svg"),
        (
            ["--picture", "a.png", "--check"],
            "needs a pass to be measured; --picture-y accuracy draws",
        ),
        (["--fvcore", "--models", "resnet17"], "--fvcore needs the package fvcore"),
        (["--picture-y", "height"], "picture_y is throughput or accuracy, not 'height'"),
        (["--json", "configs"], "is a folder"),
        (["json_file=5"], "json_file must be text, a path, not 5: quote it"),
        (["picture_file=true"], "picture_file must be text, a path, not True"),
        (["passes=null"], "passes must be a list of inference, training step, not None"),
        (["device=null"], "device is auto, cpu, cuda or mps, not None"),
        (["--device", "gpu"], "device is auto, cpu, cuda or mps, not 'gpu'"),
        (["--graphs"], "--graphs needs a CUDA device: cpu has no CUDA graphs"),
        (["--models", "resnet17"], "there is no model 'resnet17'"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_measured(words, message, monkeypatch):
    monkeypatch.setattr(complexity, "measure_in_turn", None)
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    with pytest.raises(UserError, match=message.replace(".", r"\.")) as caught:
        measure(tiny(*words))
    assert "\n" not in str(caught.value)


def test_flags_are_keys():
    words = read_complexity_arguments(
        ["--amp", "--models", "a, b.c", "--no-training", "--json=f'x.json", "--seed", "3", "size=8"]
    )
    assert words == [
        *("amp=true", "models=['a','b.c']", r"json_file='f\'x.json'", "--seed", "3", "size=8"),
        "passes=[inference]",
    ]
    assert read_complexity_arguments(["--no-training", "--no-inference"]) == ["passes=[]"]
    config = parse_complexity(["--compile", "--graphs", "--no-inference", "--threads", "2"])
    assert config["compile"] is True and config["graphs"] is True
    assert config["passes"] == [TRAINING] and config["threads"] == 2
    twin = "hybrid_deit_small_patch16"
    assert twin not in parse_complexity([f"~twins.{twin}"])["twins"]  # taken away, it stays away


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("models=[]", "models must be a list of names of nets, not []"),
        ("models=null", "models must be a list of names of nets, not None"),
        ("models=[1]", "models must be a list of names of nets, not [1]"),
        ("+twins.resnet18=5", "twins.resnet18 must be the name of a net, or null, not 5"),
        ("+keywords.resnet18=5", "keywords.resnet18 must be a mapping, or null, not 5"),
        ("seed=null", "seed must be a whole number from 0, not None"),
    ],
)
def test_what_names_no_net_is_one_line(word, message, capsys):
    with pytest.raises(SystemExit) as left:
        parse_complexity([word])
    error = capsys.readouterr().err
    assert left.value.code == 2 and error == f"error: {message}\n"


def test_the_mode_in_words():
    config = {**tiny("--compile"), "graphs": True}
    mode = settings.read_settings(config, torch.device("cuda")).mode
    assert mode == "compiled + CUDA graphs"
    assert settings.read_settings(tiny(), torch.device("cpu")).mode == "eager"
    with pytest.raises(UserError, match="--graphs is not for --table"):
        settings.read_settings({**config, "table": "a"}, torch.device("cuda"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models"], "--models needs a value"),
        (["--models", ","], "--models needs names"),
        (["--oprators"], "unknown flag --oprators; did you mean '--operators'?"),
        (["--json", "--amp"], "--json needs a value"),
    ],
)
def test_wrong_flags_are_one_line(words, message):
    with pytest.raises(UserError) as caught:
        read_complexity_arguments(words)
    assert message in str(caught.value)


def test_a_mistake_leaves_with_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["complexity.py", "--bacth-size", "3"])
    with pytest.raises(SystemExit) as left:
        parse_complexity()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown flag --bacth-size; did you mean")


def count_in_a_process() -> int:
    return len(measure(tiny("--check")))


@pytest.mark.slow
def test_of_several_processes_the_first_measures(tmp_path):
    assert in_processes(count_in_a_process, 2, tmp_path) == [2, 0]
