"""What the tests on a real Slurm share: the testbed's commands, jobs, and waiting for them."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from slurm import record
from slurm.command import capture, main
from utils.config.compose import parse_config

ROOT = Path(__file__).resolve().parents[2]
# mariadbd and munged, which are not root, must get at it: pytest's own folders are for one user.
FOLDER = Path(tempfile.gettempdir()) / "octic-slurm-tests"
ON_TWO_NODES = ["--cluster", "testbed", "--nodes", "2", "--ngpus", "2", "device=cpu"]
DINOV2 = [
    *("backbone.depth=2", "backbone.embed_dim=64", "recipe.batch_size_per_gpu=4"),
    *("recipe.crops.local_crops_number=1", "recipe.dino_head.num_prototypes=16"),
    *("recipe.dino_head.hidden_dim=16", "training.log_every=1"),
    *("~probes.knn", "~probes.linear", "~probes.segmentation"),
]
DEIT = [
    *("--config-file", "deit/quickstart.yaml", "backbone.depth=2", "backbone.embed_dim=64"),
    *("recipe.batch_size_per_gpu=4", "training.log_every=1"),
]


def tell(command: str, folder: Path = FOLDER) -> subprocess.CompletedProcess[str]:
    """A command of the testbed."""
    words = [sys.executable, "-m", "slurm.testbed", command, "--folder", str(folder)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=390)


def said_by(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, timeout=60).stdout.strip()


def state(job: str) -> str:
    return said_by("sacct", "-X", "-n", "-P", "-o", "State", "-j", job)


def until(reached: Callable[[], Any], seconds: float, log: Path | None = None) -> None:
    end = time.monotonic() + seconds
    while not reached():
        text = log.read_text() if log and log.is_file() else ""
        queue = said_by("squeue", "-h", "-o", "%i %T %r")
        assert time.monotonic() < end, f"not within {seconds} s; {text}; queue: {queue}"
        time.sleep(0.5)


def until_ended(job: str, seconds: float, log: Path | None = None) -> str:
    """Wait for the end of a job, and return its state."""
    ongoing = ("", "PENDING", "RUNNING", "REQUEUED", "COMPLETING")

    def ended() -> bool:
        # sacct tells of the attempt that ended while the job waits to start again.
        return not said_by("squeue", "-h", "-j", job) and state(job) not in ongoing

    until(ended, seconds, log)
    return state(job)


def experiment(script: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"experiments/{script}", "--output-dir", str(folder), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def submitted(script: str, folder: Path, *words: str) -> tuple[str, Path, Path]:
    """The id, the run folder and the log that a submission on two nodes names."""
    done = experiment(script, folder, *ON_TWO_NODES, *words)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    job = lines[0].removeprefix("Submitted job_id: ")
    run = Path(lines[1].removeprefix("Logs and checkpoints will be saved at: "))
    log = Path(lines[2].removeprefix("Follow rank 0: tail -F "))
    assert job.isdigit() and run == folder.parent / job and log.parent.parent == run
    assert lines[3:5] == [
        f"State: squeue -j {job}; after its end: sacct -j {job}",
        f"Cancel: scancel {job}",
    ]
    return job, run, log


def start(function: str, folder: Path, *words: str) -> None:
    """Submit a function of tests/slurm/work.py; what it prints is for capsys."""
    flags = [*ON_TWO_NODES, "--output-dir", str(folder), *words]
    parse = partial(parse_config, "dinov2/quickstart.yaml")
    main(f"tests.slurm.work.{function}", parse, flags)


def train(script: str, folder: Path, *words: str) -> None:
    """Submit a training as its script does, without starting another Python."""
    (function, parse) = capture(ROOT / "experiments" / f"{script}.py")
    main(function, parse, [*ON_TWO_NODES, "--output-dir", str(folder), *words])


def events(run: Path) -> list[str]:
    """What was noted of a run, without what every job notes."""
    lines = record.read(run)
    return [line["event"] for line in lines if line["event"] not in ("submitted", "lost_peer")]
