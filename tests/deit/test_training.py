"""The recipe in the loop, on the digits: exact resume within an epoch, one process or two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from utils.checkpoints.files import Parts
from utils.config.build import plain
from utils.config.compose import compose_config
from utils.metrics_file import read_metrics
from utils.run import train

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("device=cpu", "backbone.embed_dim=32", "backbone.depth=2", "backbone.num_heads=2"),
    *("recipe.effective_batch_size=16", "recipe.batch_size_per_gpu=8", "recipe.epochs=2"),
    *("recipe.schedules.warmup_epochs=0", "training.log_every=1", "probes.accuracy=null"),
    "recipe.drop_path_rate=0.2",
]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("utils.metrics.draw_curves", lambda path: None)


def run(folder: Path, *words: str, steps: int = 6, file: str = "deit/quickstart.yaml") -> dict:
    words = (*SMALL, f"training.max_steps={steps}", f"output_dir={folder}", *words)
    return train(plain(compose_config(file, list(words))))


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    step = (folder / "checkpoints" / "last").read_text().strip()
    return Parts(folder / "checkpoints" / step)["recipe"]


def losses_of(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("family", ["quickstart", "quickstart_plain", "quickstart_invariant"])
def test_a_stop_within_an_epoch_leaves_no_trace(tmp_path, family):
    """Weights, moving average and losses have the same bits; mixing and drop path are on."""
    file = f"deit/{family}.yaml"
    run(tmp_path / "whole", file=file)
    run(tmp_path / "stopped", steps=2, file=file)
    torch.rand(100)  # the process that resumes has another history
    run(tmp_path / "stopped", file=file)
    whole, stopped = state_of(tmp_path / "whole"), state_of(tmp_path / "stopped")
    assert whole.keys() == stopped.keys() and any(name.startswith("ema.") for name in whole)
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "stopped")


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """Two processes: four steps replicated, four sharded, and four stopped after two."""
    folder = tmp_path_factory.mktemp("pair")
    words = [*SMALL, "recipe.mixing=null", "recipe.drop_path_rate=0.0"]
    program = (
        "import json, sys, utils.metrics\n"
        "from tests.deit.test_training import compose_config, plain, train\n"
        "utils.metrics.draw_curves = lambda path: None\n"
        "from utils.joining import session\n"
        "with session('cpu'):\n"
        "    for words in json.loads(sys.argv[1]):\n"
        "        train(plain(compose_config('deit/quickstart.yaml', words)))\n"
    )
    (folder / "program.py").write_text(program)
    runs = [
        [*words, f"training.sharding={how}", f"training.max_steps={n}", f"output_dir={folder}/{to}"]
        for how, n, to in (
            ("replicate", 4, "replicate"),
            ("shard", 4, "shard"),
            ("shard", 2, "stopped"),
            ("shard", 4, "stopped"),
        )
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(folder / "program.py"), json.dumps(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["replicate", "shard"])
def test_two_processes_train_as_one(tmp_path, pair, sharding):
    """LAMB's norms and trust ratios are those of whole tensors, however they are laid out."""
    run(tmp_path / "one", "recipe.mixing=null", "recipe.drop_path_rate=0.0", steps=4)
    two = pair / sharding
    assert losses_of(two) == pytest.approx(losses_of(tmp_path / "one"), rel=1e-4)
    ours, theirs = (
        load_file(folder / "exported" / "model.safetensors") for folder in (tmp_path / "one", two)
    )
    for name in ours:
        if not name.endswith("qkv.bias"):  # a key's bias has no gradient but rounding noise
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_resume_exactly(pair):
    whole, stopped = state_of(pair / "shard"), state_of(pair / "stopped")
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
