"""Costs on a real GPU: speed, peak memory and use of it, and a net that does not fit."""

import copy

import pytest
import torch

from evaluation.commands.complexity import parse_complexity
from evaluation.cost import block_times
from evaluation.cost.complexity import measure
from evaluation.cost.models import find_backbone, make_net
from evaluation.cost.peaks import arithmetic_of, measure_peak
from evaluation.cost.timing import INFERENCE, PASSES, TRAINING, Contestant, measure_in_turn
from tests.evaluation.toys import in_processes
from utils.errors import UserError
from utils.flops import count_one_image

pytestmark = pytest.mark.gpu
NAME, TWIN = "hybrid_deit_small_patch16", "deit_small_patch16_LS"
DEVICE = torch.device("cuda")
MODES = [[], ["--amp"], ["--amp", "--compile"], ["--graphs"], ["--amp", "--compile", "--graphs"]]


@pytest.mark.parametrize("words", MODES, ids=str)
def test_speed_memory_and_use(words):
    config = parse_complexity(["--models", NAME, "--batch-size", "16", "--steps", "10", *words])
    results = measure({**config, "device": "cuda"})
    for result in results.values():
        assert list(result.speeds) == list(PASSES) and not result.lost
        weights = result.cost.parameters * 4 / 2**20
        inference, training = (result.speeds[kind] for kind in PASSES)
        assert weights < inference.peak_mib < training.peak_mib
        assert training.peak_mib > 4 * weights, "weights, gradients and AdamW's two moments"
        assert inference.images_per_second > 2 * training.images_per_second
    assert set(results[NAME].ratios) == set(PASSES)


def test_peak_memory_is_of_the_net_alone():
    """Another net on the device adds nothing to it."""
    images = torch.randn(4, 3, 224, 224, device=DEVICE)
    small = Contestant(make_net(NAME, find_backbone(NAME), DEVICE), images)
    for kind in PASSES:
        small.turn(kind, 1)
    alone = [small.turn(kind, 2).peak_bytes for kind in PASSES]
    large = make_net("deit_large_patch16_LS", find_backbone("deit_large_patch16_LS"), DEVICE)
    beside = [small.turn(kind, 2).peak_bytes for kind in PASSES]
    assert beside == pytest.approx(alone, rel=0.02)
    assert sum(p.numel() for p in large.parameters()) > 3e8


def test_out_of_memory_leaves_the_others(capsys):
    class Hungry(torch.nn.Module):
        def forward(self, images):
            return torch.empty(2**45, device=DEVICE)

    images = torch.randn(2, 3, 32, 32, device=DEVICE)
    net = make_net(TWIN, find_backbone(TWIN, size=32), DEVICE)
    nets = {"hungry": Contestant(Hungry(), images), "net": Contestant(net, images)}
    turns, lost = measure_in_turn(nets, INFERENCE, steps=2, rounds=2, warmup=1)
    assert lost == ["hungry"] and len(turns["net"]) == 2
    assert "hungry: out of memory" in capsys.readouterr().out


@pytest.mark.parametrize("name", [NAME, TWIN])
def test_the_gpu_counts_what_meta_counts(name):
    """Whatever kernel attention takes; the operators of ours are known, Triton or not."""
    node = find_backbone(name)
    counts = [count_one_image(make_net(name, node, device), 224) for device in ("meta", DEVICE)]
    assert counts[0][:2] == counts[1][:2] and not counts[1].uncounted
    with torch.autocast("cuda", dtype=torch.bfloat16):
        half = count_one_image(make_net(name, node, DEVICE), 224)
    assert half[:2] == counts[0][:2] and not half.uncounted


def test_a_product_reaches_no_more_than_the_device_can():
    for dtype in (torch.bfloat16, None):
        assert measure_peak(DEVICE, arithmetic_of(DEVICE, dtype)).flops > 1e12


def test_the_optimizers_state_is_given_back():
    net = make_net(TWIN, find_backbone(TWIN), DEVICE)
    runner = Contestant(net, torch.randn(2, 3, 224, 224, device=DEVICE))
    runner.turn(TRAINING, 1)
    before = torch.cuda.memory_allocated()
    runner.turn(TRAINING, 2)
    assert torch.cuda.memory_allocated() <= before + 2**20


def pair_of(*, compile, batch=4):
    """The same net twice, with the same images and labels: step by step, and as CUDA graphs."""
    net = make_net(NAME, find_backbone(NAME), "cpu").to(DEVICE)
    images = torch.randn(batch, 3, 224, 224, device=DEVICE)
    eager = Contestant(copy.deepcopy(net), images)
    replayed = Contestant(net, images, compile=compile, graphs=True)
    eager.labels = replayed.labels
    return eager, replayed


@pytest.mark.parametrize("compile", [False, True])
def test_a_replay_gives_what_the_net_gives(compile):
    eager, replayed = pair_of(compile=compile)
    replayed.turn(INFERENCE, 1)
    recording = replayed.recordings[INFERENCE]
    for _ in range(2):  # also of images that came after the capture
        recording.graph.replay()
        torch.cuda.synchronize()
        with torch.no_grad():
            expected = eager.net.eval()(eager.images)
        torch.testing.assert_close(recording.output, expected, rtol=1e-3, atol=1e-3)
        eager.images.normal_()


@pytest.mark.parametrize("compile", [False, True])
def test_replayed_training_steps_move_the_weights_as_steps_do(compile):
    eager, replayed = pair_of(compile=compile)
    start = [p.detach().clone() for p in eager.net.parameters()]
    replayed.turn(TRAINING, 4)  # 3 steps before the capture, 5 replays
    eager.turn(TRAINING, 7)
    moved, apart = 0.0, 0.0
    for p, ours, before in zip(
        eager.net.parameters(), replayed.net.parameters(), start, strict=True
    ):
        moved += float((p - before).square().sum())
        apart += float((p - ours).square().sum())
    assert moved > 0 and apart < 0.1**2 * moved
    assert all(p.grad is None for p in replayed.net.parameters())


def test_the_peak_of_a_graph_is_that_of_the_steps():
    """Whatever another net holds, and whatever is captured besides."""
    eager, replayed = pair_of(compile=False, batch=16)
    for kind in PASSES:
        eager.turn(kind, 1)
        expected = eager.turn(kind, 1).peak_bytes
        assert replayed.turn(kind, 1).peak_bytes == pytest.approx(expected, rel=0.1)
        assert replayed.turn(kind, 1).peak_bytes == pytest.approx(expected, rel=0.1)


def test_the_memory_of_graphs_is_given_back():
    eager, replayed = pair_of(compile=False, batch=32)
    measure_in_turn({"net": replayed}, TRAINING, steps=1, rounds=1, warmup=0)  # workspaces
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    replayed.turn(TRAINING, 1)
    assert torch.cuda.memory_reserved() > before + 2**29
    replayed.release()
    assert torch.cuda.memory_reserved() <= before + 2**26
    assert not replayed.recordings and not eager.recordings


class Waiting(torch.nn.Module):
    """Asks the device for a number in its forward pass."""

    def forward(self, images):
        return images * images.mean().item()


def capture_what_waits() -> str:
    nets = {"waiting": Contestant(Waiting(), torch.randn(2, 3, 8, 8, device=DEVICE), graphs=True)}
    try:
        measure_in_turn(nets, INFERENCE, steps=1, rounds=1, warmup=0)
    except UserError as error:
        return str(error)
    return "captured"


def test_a_step_that_waits_for_the_device_is_one_line(tmp_path):
    """In a process of its own: a broken capture may leave the device's memory in disorder."""
    (said,) = in_processes(capture_what_waits, 1, tmp_path)
    assert said.startswith("waiting: inference cannot be captured as a CUDA graph (")
    assert said.endswith("measure it without --graphs") and "\n" not in said


def test_times_of_blocks_are_those_of_their_kernels(capsys):
    found = block_times.measure([NAME], batch=8, listed=True)[NAME]
    assert len(found) == 8, "two kinds of blocks, two modes, two passes"
    for time in found.values():
        busy = sum(kernel.microseconds for kernel in time.kernels)
        assert 0.5 * busy < time.microseconds < 3 * busy + 50
    said = capsys.readouterr().out
    assert "time of a block" in said and "OcticBlock, forward and backward" in said
