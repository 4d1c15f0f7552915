"""A recipe of a few numbers that needs everything the loop offers, and a way to run it.

Run as a program (under torchrun) it trains a list of folders with their options.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils import distributed, metrics
from utils.checkpoints.files import Parts
from utils.joining import session
from utils.layout import local
from utils.run import run_built
from utils.run_objects import Run
from utils.signals import StopSignal

SAMPLES = 24


class Net(nn.Module):
    """Two linear units with dropout between them, as stand-in for a backbone with drop path."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.scale = nn.Parameter(torch.ones(6))
        self.dropout = dropout

    def encode(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + nn.functional.dropout(block(x).tanh(), self.dropout, self.training)
        return x * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)


def hang_at_step_3(how: str) -> Callable[[int], None]:
    """What makes rank 1 hang when it has finished three steps."""
    hangs = {
        "sleep": lambda: time.sleep(600),
        "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
        "hold": lambda: ctypes.PyDLL(None).sleep(600),  # as C code does: no thread of ours may run
    }
    return lambda step: hangs[how]() if step == 3 and distributed.rank() == 1 else None


class TinyRecipe(nn.Module):
    """A student learns random targets, a teacher follows, a buffer moves with every forward."""

    def __init__(
        self,
        *,
        total_steps: int = 12,
        accumulation: int = 1,
        dropout: float = 0.2,
        poison: tuple[int, ...] = (),
        breaks: tuple[int, float] = (-1, 0.0),
        on_step: Callable[[int], None] = lambda step: None,
        hang: str = "",
    ) -> None:
        super().__init__()
        self.total_steps, self.accumulation = total_steps, accumulation
        self.batch_size_per_gpu = SAMPLES // accumulation // distributed.world_size()
        self.breaks = breaks  # after this step, the last rank's part of a weight is this value
        self.poison, self.on_step = poison, hang_at_step_3(hang) if hang else on_step
        self.student, self.teacher = Net(dropout), Net(0.0)
        self.head = nn.Linear(6, 3)  # not wrapped by parallelize
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False).eval()
        self.register_buffer("centre", torch.zeros(6))
        self.schedules = {
            "lr": lambda step: 1e-2 * (1 - step / total_steps),
            "last_layer_lr": lambda step: 0.0 if step < 3 else 1e-2,
            "weight_decay": lambda step: 0.04 + 0.01 * step,
            "momentum": lambda step: 0.9,
        }

    def parallelize(self, wrap: Callable[..., nn.Module]) -> None:
        for net in (self.student, self.teacher):
            wrap(net, units=list(net.blocks))

    def param_groups(self) -> list[dict[str, Any]]:
        decayed = [p for n, p in self.student.named_parameters() if n.endswith("weight")]
        rest = [p for n, p in self.student.named_parameters() if not n.endswith("weight")]
        return [
            {"params": decayed, "lr_schedule": "lr", "lr_multiplier": 0.5},
            {"params": rest, "lr_schedule": "lr", "weight_decay_multiplier": 0.0},
            {"params": list(self.head.parameters()), "lr_schedule": "last_layer_lr"},
        ]

    def batches(self, first_step: int) -> Iterator[dict[str, Tensor]]:
        torch.rand(3)  # as a loader does: it must not disturb the dropout
        step, rank, world = first_step, distributed.rank(), distributed.world_size()
        while True:
            generator = torch.Generator().manual_seed(step)
            whole = torch.randn(SAMPLES, 9, generator=generator)
            for micro_batch in range(self.accumulation):
                x = whole.chunk(self.accumulation)[micro_batch].chunk(world)[rank]
                yield {"x": x[:, :6], "y": x[:, 6:], "step": torch.tensor(step)}
            step += 1

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch

    def losses(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        assert int(batch["step"]) == step
        self.on_step(step)
        x = batch["x"] * (float("nan") if step in self.poison else 1.0)
        features = self.student.encode(x)
        self.centre.mul_(0.5).add_(features.detach().mean(0), alpha=0.5)
        guide = (features - self.teacher.encode(x).detach()).square().mean()
        fit = (self.head(features) - batch["y"]).square().mean()
        return {"loss": fit + 0.1 * guide, "fit": fit.detach(), "guide": guide.detach()}

    def clipped_parts(self) -> dict[str, nn.Module]:
        return {"student": self.student, "head": self.head}

    def after_step(self, step: int) -> None:
        momentum = self.schedules["momentum"](step)
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        with torch.no_grad():
            for ours, theirs in pairs:
                ours.lerp_(theirs, 1 - momentum)
            if step == self.breaks[0] and distributed.rank() == distributed.world_size() - 1:
                local(self.student.blocks[1].weight).fill_(self.breaks[1])

    @property
    def exported(self) -> nn.Module:
        return self.teacher


def make_config(folder: Path, **changes: Any) -> dict[str, Any]:
    """A whole config for `run_built`; `changes` go into the section that has the key."""
    config: dict[str, Any] = {
        "name": "tiny",
        "output_dir": str(folder),
        "seed": 0,
        "device": "cpu",
        "backbone": {},
        "recipe": {},
        "optimizer": {},
        "training": {
            "precision": "fp32",
            "compile": False,
            "sharding": "replicate",
            "activation_checkpointing": False,
            "clip_grad": 0.5,
            "max_steps": None,
            "weights": None,
            "resume": True,
            "nan_patience": 2,
            "log_every": 4,
            "hang_timeout_s": 60,
        },
        "checkpoint": {"every": 0, "keep_last": 3, "keep_every": 0},
        "probe_every": 0,
        "logging": {"wandb": False, "wandb_project": "octic", "tensorboard": False},
    }
    for key, value in changes.items():
        section = next((config[s] for s in ("training", "checkpoint") if key in config[s]), config)
        assert key in section
        section[key] = value
    return config


def train_tiny(
    folder: Path,
    *,
    probes: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    optimizer: Any = torch.optim.AdamW,
    data: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[dict[str, Any], TinyRecipe]:
    """Train the tiny recipe in `folder`; returns summary and recipe."""
    torch.manual_seed(0)
    made = TinyRecipe(**(recipe or {}))
    data = {"val": ()} if data is None else data
    run = Run(make_config(folder, **changes), made, optimizer, data, probes or {})
    with StopSignal() as stop:
        return run_built(run, torch.device("cpu"), stop), made


def parts_of(folder: Path) -> Parts:
    """The parts of a run's last checkpoint."""
    checkpoints = folder / "checkpoints"
    return Parts(checkpoints / (checkpoints / "last").read_text().strip())


def train_together(processes: int, runs: list[tuple[str, dict[str, Any]]]) -> None:
    """Train the tiny recipe in several processes, in one folder with its options after another."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", "-m", "tests.utils.loop_case", json.dumps(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    torch.set_num_threads(1)
    metrics.draw_curves = lambda path: None
    os.environ["LOCAL_WORLD_SIZE"] = "2"  # as if two made a node
    with session("cpu"):
        for folder, arguments in json.loads(sys.argv[1]):
            train_tiny(Path(folder), **arguments)
