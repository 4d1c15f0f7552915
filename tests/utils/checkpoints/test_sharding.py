"""The ViTs under FSDP2, block by block, with every switch, compute what one process computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.utils.sharding_case import MICRO_BATCHES, train
from utils.communication import Part, sent_bytes, step_payload

ROOT = Path(__file__).parents[3]
NETS = pytest.mark.parametrize("net", ["plain", "octic"])


def train_together(folder: Path, processes: int, cases: list[dict], device: str = "cpu") -> list:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", "-m", "tests.utils.sharding_case"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, json.dumps(cases), str(folder), device],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{number}.pt") for number in range(len(cases))]


def assert_alike(found: dict, alone: dict, *, tolerance: float = 1e-5) -> None:
    """Losses of both steps, and every gradient of the first."""
    assert found["losses"] == pytest.approx(alone["losses"], rel=tolerance)
    for name, gradient in alone["gradients"].items():
        scale = gradient.abs().max()
        error = (found["gradients"][name] - gradient).abs().max()
        assert error <= tolerance * scale + 1e-8, name


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> dict[tuple[str, str], dict]:
    """Two processes, both nets: each layout once, with recomputation where it is sharded."""
    keys = [(net, how) for net in ("plain", "octic") for how in ("replicate", "shard", "bf16")]
    cases = [
        {"name": net}
        | {
            "replicate": {"sharding": "replicate"},
            "shard": {"sharding": "shard", "activation_checkpointing": True},
            "bf16": {"sharding": "shard", "precision": "bf16"},
        }[how]
        for net, how in keys
    ]
    found = train_together(tmp_path_factory.mktemp("pair"), 2, cases)
    return dict(zip(keys, found, strict=True))


@pytest.fixture(scope="module")
def alone() -> dict[str, dict]:
    return {name: train(name) for name in ("plain", "octic")}


@pytest.mark.slow
@NETS
@pytest.mark.parametrize("how", ["replicate", "shard"])
def test_two_processes_compute_what_one_does(pair, alone, net, how):
    found = pair[net, how]
    assert_alike(found, alone[net])
    assert found["sharded"] == 1.0, "no parameter is left out"
    total = sum(weight.numel() for weight in alone[net]["weights"].values())
    share = 1.0 if how == "replicate" else 0.5
    assert found["held"] == pytest.approx(total * share, rel=0.05)


@pytest.mark.slow
@NETS
def test_bf16_travels_and_float32_is_summed(pair, alone, net):
    """Parameters travel as bf16; masters and the sums of gradients are float32."""
    found = pair[net, "bf16"]
    assert set(found["kinds"]) == {"all_gather bfloat16", "reduce_scatter float32"}
    assert found["dtypes"] == ["torch.float32"]
    assert found["losses"] == pytest.approx(alone[net]["losses"], rel=0.03)


@pytest.mark.slow
@NETS
@pytest.mark.parametrize("how", ["replicate", "shard", "bf16"])
def test_what_is_sent_is_what_the_formula_says(pair, alone, net, how):
    """To the padding of shards that do not divide."""
    own = sum(weight.numel() for weight in alone[net]["weights"].values())
    head = sum(w.numel() for n, w in alone[net]["weights"].items() if n.startswith("head."))
    parts = [Part(own, trained=True), Part(own - head, trained=False)]
    sharding = "replicate" if how == "replicate" else "shard"
    width = 2 if how == "bf16" else 4
    expected = step_payload(parts, sharding, micro_batches=MICRO_BATCHES, width=width)
    for kind, size in expected.items():
        assert pair[net, how]["bytes"].get(kind, 0) == pytest.approx(size, rel=0.02)


def test_the_rings_share():
    assert sent_bytes("all_gather", 800, 4) == sent_bytes("reduce_scatter", 800, 4) == 600
    assert sent_bytes("all_reduce", 800, 4) == 1200
    assert all(sent_bytes(k, 800, 1) == 0 for k in ("all_gather", "all_reduce", "broadcast"))
    hybrid = step_payload([Part(10, True)], "hybrid", micro_batches=3)
    assert hybrid == {"all_gather": 240, "reduce_scatter": 120, "all_reduce": 120}


@pytest.mark.slow
def test_four_processes_compute_what_one_does(tmp_path, alone):
    keys = [
        (net, how) for net in ("plain", "octic") for how in ("replicate", "shard", "hybrid", "bf16")
    ]
    cases = [
        {"name": net, "activation_checkpointing": True}
        | ({"sharding": "shard", "precision": "bf16"} if how == "bf16" else {"sharding": how})
        for net, how in keys
    ]
    for (net, how), found in zip(keys, train_together(tmp_path, 4, cases), strict=True):
        if how == "bf16":
            assert found["losses"] == pytest.approx(alone[net]["losses"], rel=0.03)
        else:
            assert_alike(found, alone[net])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_compiled_blocks_compute_the_same_in_company(tmp_path, alone, processes):
    """Each block is compiled, recomputed and sharded."""
    switches = {"sharding": "shard", "compile": True, "activation_checkpointing": True}
    cases = [{"name": net, **switches} for net in ("plain", "octic")]
    for case, found in zip(cases, train_together(tmp_path, processes, cases), strict=True):
        assert_alike(found, alone[case["name"]], tolerance=1e-4)


@pytest.mark.gpu
@NETS
def test_a_gpu_alone_trains_with_every_switch(net):
    """One GPU: recomputation and compiled blocks change nothing, bf16 little."""
    switches = {"activation_checkpointing": True, "compile": True, "device": "cuda"}
    plain = train(net, device="cuda")
    assert_alike(train(net, **switches), plain, tolerance=1e-3)
    half = train(net, precision="bf16", **switches)
    assert half["losses"] == pytest.approx(plain["losses"], rel=0.03)


@pytest.mark.gpu
@NETS
def test_one_gpu_trains_under_torchrun(tmp_path, net):
    """As a job of one process does: nccl's group, bf16, compiled blocks."""
    case = {"name": net, "sharding": "shard", "precision": "bf16", "device": "cuda"}
    (found,) = train_together(tmp_path, 1, [{**case, "compile": True}], "cuda")
    assert found["losses"] == pytest.approx(train(net)["losses"], rel=0.03)
