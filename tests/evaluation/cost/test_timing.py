"""Nets are timed in turn, compared round by round, and one that needs too much memory drops out."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from evaluation.cost import graphs, timing
from evaluation.cost.graphs import Recording
from evaluation.cost.models import find_backbone, make_net
from evaluation.cost.timing import (
    INFERENCE,
    PASSES,
    TRAINING,
    Contestant,
    Turn,
    measure_in_turn,
    ratio_of,
    speed_of,
)
from tests.evaluation.backbones import IMAGE_SIZE, any_backbone, make
from utils.errors import UserError
from utils.ranges import OutOfRange

RELEASED = [("a", "released"), ("b", "released")]


class Stub:
    """Takes a second a step, notes its turns, and fails in the asked one."""

    def __init__(self, name, log, fails_at=None, error=None):
        self.name, self.log, self.fails_at = name, log, fails_at
        self.images, self.turns = torch.zeros(4, 1), 0
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")

    def turn(self, kind, steps):
        self.turns += 1
        if self.turns == self.fails_at:
            raise self.error
        self.log.append((self.name, steps))
        return Turn([1.0] * steps, 3 * 2**20)

    def release(self):
        self.log.append((self.name, "released"))


def test_turns_alternate_and_steps_are_dealt_out():
    log = []
    nets = {name: Stub(name, log) for name in "ab"}
    turns, lost = measure_in_turn(nets, INFERENCE, steps=5, rounds=2, warmup=7)
    assert log == [("a", 7), ("b", 7), ("a", 3), ("b", 3), ("a", 2), ("b", 2)] + RELEASED
    assert [len(turn.seconds) for turn in turns["a"]] == [3, 2] and lost == []


@pytest.mark.parametrize(
    ("fails_at", "error"),
    [
        *((turn, torch.OutOfMemoryError("CUDA out of memory")) for turn in (1, 2, 3)),
        (1, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")),
    ],
)
def test_out_of_memory_is_one_line_and_the_others_go_on(fails_at, error, capsys):
    log = []
    nets = {"a": Stub("a", log, fails_at, error), "b": Stub("b", log)}
    turns, lost = measure_in_turn(nets, TRAINING, steps=3, rounds=3, warmup=1)
    assert lost == ["a"] and list(turns) == ["b"] and len(turns["b"]) == 3
    said = [line for line in capsys.readouterr().out.splitlines() if "memory" in line]
    assert said == ["a: out of memory in training step at batch 4; --batch-size N takes less"]


def test_other_errors_are_raised():
    nets = {"a": Stub("a", [], 1, RuntimeError("shapes do not fit"))}
    with pytest.raises(RuntimeError, match="shapes"):
        measure_in_turn(nets, INFERENCE, steps=1, rounds=1, warmup=0)


def test_a_slow_spell_of_the_machine_cancels_out_of_the_ratio():
    """The twin is twice as slow in every round, though the second round is ten times slower."""
    ours = [Turn([1.0, 1.0], None), Turn([10.0], None), Turn([1.0], None)]
    twins = [Turn([2.0, 2.0], None), Turn([20.0], None), Turn([2.2], None)]
    assert ratio_of(ours, twins) == pytest.approx((2.0, 2.0, 2.2))
    speed = speed_of(ours, batch=13)
    assert speed == (13 * 4 / 13, 1.3, 13.0, None)
    assert speed_of([Turn([1.0], 2**21)], 1).peak_mib == 2


@any_backbone
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_steps_of_nets_of_any_kind(backbone, dtype):
    """A training step moves every trained weight and leaves nothing behind but that."""
    net = make(backbone)
    runner = Contestant(net, torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=dtype)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    turn = runner.turn(INFERENCE, 2)
    assert len(turn.seconds) == 2 and all(second > 0 for second in turn.seconds)
    assert turn.peak_bytes is None, "a CPU does not tell"
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    runner.turn(TRAINING, 1)
    moved = [not torch.equal(p, before[name]) for name, p in net.named_parameters()]
    assert sum(moved) > 0.8 * len(moved)
    assert all(p.grad is None for p in net.parameters())


def test_classifiers_get_labels_and_others_the_mean_square():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    images = torch.randn(3, 3, 2, 2)
    output = torch.randn(3, 5)
    assert Contestant(net, images).loss(output) == output.square().mean()
    net.num_classes = 5
    runner = Contestant(net, images)
    assert runner.loss(output) == nn.functional.cross_entropy(output, runner.labels)


@pytest.fixture
def light_compiler(monkeypatch):
    """Graphs are traced, but no C++ is compiled."""
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda unit: original(unit, backend="aot_eager"))
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    "name",
    [pytest.param("hybrid_deit_small_patch16", marks=pytest.mark.slow), "deit_small_patch16_LS"],
)
def test_equal_blocks_are_compiled_once(name, light_compiler):
    """However many there are; the first and the last of a kind may be graphs of their own."""
    found = []
    for depth in (6, 10):
        torch.compiler.reset()
        counters.clear()
        keywords = {"depth": depth, "embed_dim": 32, "num_heads": 2, "patch_size": 8}
        net = make_net(name, find_backbone(name, size=16, keywords=keywords), "cpu")
        runner = Contestant(net, torch.randn(2, 3, 16, 16), compile=True)
        for kind in PASSES:
            runner.turn(kind, 1)
            found.append(counters["stats"]["unique_graphs"])
        assert not counters["graph_break"]
        kinds = len({type(block) for block in net.blocks})
    assert found[:2] == found[2:]
    assert 0 < found[0] <= 3 * kinds and found[1] == 2 * found[0]


class Linear(nn.Module):
    """A net without blocks; torch 2.11 compiles no bare nn.Sequential."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(x.flatten(1))


def test_a_net_without_blocks_is_compiled_whole(light_compiler):
    runner = Contestant(Linear(), torch.randn(2, 3, 2, 2), compile=True)
    for number, kind in enumerate(PASSES, start=1):
        runner.turn(kind, 2)
        assert counters["stats"]["unique_graphs"] == number


def test_a_pass_is_captured_once_and_given_back(monkeypatch):
    steps = []

    def record(step, device):
        steps.append(step())
        return Recording(SimpleNamespace(replay=lambda: None), step, steps[-1], 1000)

    monkeypatch.setattr(timing, "record", record)
    net, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), torch.randn(2, 3, 2, 2)
    runner = Contestant(net, images, graphs=True)
    turns, lost = measure_in_turn({"net": runner}, INFERENCE, steps=4, rounds=2, warmup=1)
    assert len(steps) == 1 and lost == [] and not runner.recordings
    assert torch.equal(steps[0], net(images))
    assert [len(turn.seconds) for turn in turns["net"]] == [2, 2]
    assert {turn.peak_bytes for turn in turns["net"]} == {4 * (65 + 24) + 1000}


def test_what_cannot_be_captured_is_one_line_with_the_net():
    log = []
    nets = {"a": Stub("a", log, 1, UserError("cannot be captured")), "b": Stub("b", log)}
    with pytest.raises(UserError, match="^a: inference cannot be captured$"):
        measure_in_turn(nets, INFERENCE, steps=1, rounds=1, warmup=0)
    assert log == RELEASED


@pytest.mark.parametrize(
    ("first", "expected", "message"),
    [
        (
            RuntimeError("item() waits\n  at x"),
            UserError,
            r"CUDA graph \(item\(\) waits\); measure",
        ),
        (torch.OutOfMemoryError("no room"), torch.OutOfMemoryError, "out of memory.*no room"),
        (None, UserError, "capture is broken"),
    ],
)
def test_a_broken_capture_tells_what_broke_it(first, expected, message, monkeypatch):
    """The end of a capture that failed raises an error of its own, over the first one."""

    @contextmanager
    def graph(_, stream):
        try:
            yield
        finally:
            raise RuntimeError("capture is broken")

    def step():
        if first:
            raise first
        return torch.zeros(())

    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(expected, match=message):
        graphs._capture(None, step, None)


@pytest.mark.parametrize("turns", [[], [Turn([], None)], [Turn([1.0], None), Turn([], None)]])
def test_turns_without_steps_have_no_speed(turns):
    with pytest.raises(OutOfRange, match="steps must be a whole number from 1, not 0"):
        speed_of(turns, batch=1)
