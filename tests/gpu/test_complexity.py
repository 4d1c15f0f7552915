"""Costs on a real GPU: speed, peak memory and use of it, and a net that does not fit."""

import pytest
import torch

from evaluation.cost.arguments import parse_complexity
from evaluation.cost.complexity import measure
from evaluation.cost.models import find_backbone, make_net
from evaluation.cost.peaks import arithmetic_of, measure_peak
from evaluation.cost.timing import INFERENCE, PASSES, TRAINING, Contestant, measure_in_turn
from utils.flops import count_one_image

pytestmark = pytest.mark.gpu
NAME, TWIN = "hybrid_deit_small_patch16", "deit_small_patch16_LS"
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("words", [[], ["--amp"], ["--amp", "--compile"]], ids=str)
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
