"""SIGKILL at random moments, each followed by a resume: the run must end bit for bit as if nothing
had been.

A run is killed again and again until it reaches its end, then compared with an undisturbed one:
weights, optimiser, averages, centres, random numbers, and the losses of every step.
"""

import random
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import torch

# A fork starts at once because its parent has these.
import dinov2.recipe  # noqa: F401
import octic.models  # noqa: F401
from slurm.launch import launch
from tests.rehearsal.forks import Child, Outcome, say
from utils import metrics
from utils.checkpoints.files import Parts
from utils.config.build import plain
from utils.config.compose import compose_config
from utils.metrics_file import read_metrics

STEPS = 24
WORDS = [
    *("backbone.embed_dim=32", "backbone.depth=2", "backbone.num_heads=2", "device=cpu"),
    "recipe.crops.local_crops_number=2",
    "recipe.dino_head={num_prototypes: 64, hidden_dim: 32, bottleneck_dim: 16}",
    *("recipe.centering=centering", "recipe.num_workers=0"),
    *(f"training.max_steps={STEPS}", "training.log_every=1", "checkpoint.every=1"),
    *("checkpoint.keep_last=2", "probes.knn=null", "probes.linear=null"),
    "probes.segmentation=null",
]


def small_config(processes: int) -> dict[str, Any]:
    """The config that experiments/train_dinov2.py makes of these words."""
    alone = ["recipe.batch_size_per_gpu=8"]
    shared = ["recipe.batch_size_per_gpu=4", "training.sharding=shard"]
    words = [*WORDS, *(alone if processes == 1 else shared)]
    return plain(compose_config("dinov2/quickstart.yaml", words))


def train_small(config: dict[str, Any], folder: Path) -> None:
    torch.set_num_threads(1)
    metrics.draw_curves = lambda path: None  # it takes longer than the training
    launch("utils.run.train", config | {"output_dir": str(folder)})


class Company:
    """The processes of one start of a run, one or several."""

    def __init__(self, config: dict[str, Any], folder: Path, logs: Path, processes: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.children = []
        for rank in range(processes):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x"}
            env = {key: str(value) for key, value in place.items()} if processes > 1 else {}
            self.children.append(Child(lambda: train_small(config, folder), logs / str(rank), env))

    def kill(self, victim: int) -> bool:
        """SIGKILL one; the others as a launcher does that finds one gone. Whether it still ran."""
        outcome = None
        self.children[victim].kill()
        for rank, child in enumerate(self.children):
            if rank != victim:
                child.kill()
            found = child.wait(30)
            outcome = found if rank == victim else outcome
        return outcome is not None and outcome.code == -9

    def wait(self, timeout_s: float = 300) -> list[Outcome]:
        return [child.wait(timeout_s) for child in self.children]


def rehearse(
    count: int, folder: Path, *, seed: int = 0, processes: int = 1, say: Any = say
) -> dict[str, Any]:
    """Kill `count` times; returns the figures. Raises AssertionError at the first difference."""
    draw, begun = random.Random(seed), time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    undisturbed, config = folder / "undisturbed", small_config(processes)

    def start(run: Path) -> Company:
        return Company(config, run, folder / "logs", processes)

    (first, *_) = start(undisturbed).wait()
    assert first.code == 0, first.stderr
    span = first.seconds
    figures: dict[str, Any] = dict.fromkeys(
        ("kills", "before the first step", "in a save", "elsewhere", "runs", "starts"), 0
    )
    while figures["kills"] < count:
        run = folder / f"run{figures['runs']}"
        figures["runs"] += 1
        while figures["kills"] < count:
            before = _newest(run)
            company = start(run)
            figures["starts"] += 1
            time.sleep(draw.uniform(0, 0.6) * span)
            if not company.kill(draw.randrange(processes)):
                break  # it had come to its end
            figures["kills"] += 1
            if list((run / "checkpoints").glob(".*")):
                figures["in a save"] += 1
            elif _newest(run) == before and _steps(run) == before:
                figures["before the first step"] += 1
            else:
                figures["elsewhere"] += 1
        for outcome in start(run).wait():
            assert outcome.code == 0, outcome.stderr
            assert "damaged" not in outcome.stdout, outcome.stdout
        figures["starts"] += 1
        _assert_same(run, undisturbed)
        shutil.rmtree(run)
        say(f"{figures['kills']} kills, {figures['runs']} runs ended bit for bit as undisturbed")
    figures["seconds"] = round(time.monotonic() - begun)
    return figures


def _assert_same(run: Path, undisturbed: Path) -> None:
    ours, theirs = (Parts(folder / "checkpoints" / str(STEPS)) for folder in (run, undisturbed))
    _assert_equal({name: ours[name] for name in ours}, {name: theirs[name] for name in theirs})
    left, right = _losses(run), _losses(undisturbed)
    assert left == right, f"{run}: other losses than the undisturbed run"


def _assert_equal(ours: Any, theirs: Any, where: str = "") -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            _assert_equal(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            _assert_equal(one, other, f"{where}/{index}")
    elif isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def _losses(run: Path) -> list[tuple[float, float]]:
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [(line["loss"], line["grad_norm/backbone"]) for line in lines]


def _newest(run: Path) -> int:
    pointer = run / "checkpoints/last"
    return int(pointer.read_text()) if pointer.exists() else 0


def _steps(run: Path) -> int:
    lines = read_metrics(run / "metrics.jsonl")
    return int(lines[-1]["step"]) if lines else 0
