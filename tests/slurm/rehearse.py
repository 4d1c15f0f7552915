"""Accidents of every kind on a real Slurm, one after another, to one run.

The run must end with the weights, to the bit, and the losses of a run that nothing happened to.
`python -m tests.slurm.rehearse [--times N]` takes what `python -m slurm.testbed` takes;
its own testbed comes and goes with it.
"""

import argparse
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from safetensors.torch import load_file

from slurm import record
from tests.slurm.cluster import DINOV2, FOLDER, tell, train, until, until_ended

WORDS = [*DINOV2, "recipe.num_workers=1", "checkpoint.every=2", "--nodes", "2", "--ngpus", "1"]


def preempt(job: str, run: Path) -> None:
    """An urgent job takes both nodes."""
    words = ["--partition=urgent", "--nodes=2", "--ntasks-per-node=4", "--output=/dev/null"]
    slurm("sbatch", *words, "--wrap=sleep 3")


def signal_it(job: str, run: Path) -> None:
    """What Slurm sends before the time limit."""
    slurm("scancel", "--signal=USR2", job)


def requeue(job: str, run: Path) -> None:
    """As an administrator does."""
    slurm("scontrol", "requeue", job)


def kill(job: str, run: Path) -> None:
    """As the kernel does for want of memory."""
    began = [line for line in record.read(run) if line["event"] == "began"]
    os.kill(began[-1]["pid"], signal.SIGKILL)


def fail_node(job: str, run: Path) -> None:
    """A node goes down, and comes back."""
    slurm("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=rehearsal")
    time.sleep(3)
    subprocess.run(["scontrol", "update", "NodeName=node2", "State=RESUME"], capture_output=True)


ACCIDENTS: dict[str, Callable[[str, Path], None]] = {
    "pre-emption": preempt,
    "time-limit signal": signal_it,
    "requeue": requeue,
    "killed process": kill,
    "node failure": fail_node,
}


def slurm(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=60)


def submit(folder: Path, steps: int) -> tuple[str, Path]:
    """The id and the log of a run of so many steps."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train("train_dinov2", folder, *WORDS, f"training.max_steps={steps}")
    job = re.search(r"job_id: (\d+)", said.getvalue())[1]
    return job, folder / "slurm" / f"{job}_0_log.out"


def rehearse(count: int, folder: Path) -> dict[str, object]:
    """`count` accidents in turn; returns the figures, raises AssertionError at a difference."""
    begun, steps = time.monotonic(), 12 * count + 12
    calm, calm_log = submit(folder / "calm", steps)
    assert until_ended(calm, 3600) == "COMPLETED", calm_log.read_text()
    job, log = submit(run := folder / "disturbed", steps)
    happened: Counter[str] = Counter()
    for number in range(count):
        until(lambda number=number: _under_way(run, number), 600, log)
        name = list(ACCIDENTS)[number % len(ACCIDENTS)]
        ACCIDENTS[name](job, run)
        happened[name] += 1
        print(f"{number + 1}: {name} at step {max(_losses(run))}", flush=True)
    assert until_ended(job, 1200, log) == "COMPLETED", log.read_text()
    ours, theirs = (
        load_file(place / "exported/model.safetensors") for place in (run, folder / "calm")
    )
    assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)
    assert _losses(run) == _losses(folder / "calm") and len(_losses(run)) == steps
    attempts = [line["attempt"] for line in record.read(run) if line["event"] == "began"]
    return {
        "accidents": dict(happened),
        "starts": len(attempts),
        "left in order, with a checkpoint": sum(
            line["event"] == "again" and line["kind"] == "stopped" for line in record.read(run)
        ),
        "steps": steps,
        "tensors equal to the bit": len(ours),
        "seconds": round(time.monotonic() - begun),
    }


def _under_way(run: Path, number: int) -> bool:
    """Whether the attempt after so many accidents has finished a step of its own."""
    begins = [line for line in record.read(run) if line["event"] == "began"]
    fresh = run / "metrics.jsonl"
    if len(begins) <= number or not fresh.is_file():
        return False
    log = next((run / "slurm").glob("*_0_log.out")).read_text()
    since = log.rpartition("Loading pickle")[2]
    return bool(re.search(r"^step \d+/", since, re.MULTILINE))


def _losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.rehearse", description=__doc__)
    parser.add_argument("--times", type=int, default=10, help="accidents; 10 by default")
    times = parser.parse_args().times
    os.environ |= {"SLURM_CONF": f"{FOLDER}/slurm.conf", "OMP_NUM_THREADS": "1"}
    with FileLock(f"{FOLDER}.lock", timeout=1800):  # the tests use the same testbed
        done = tell("up")
        if done.returncode:
            print(done.stdout + done.stderr, file=sys.stderr)
            return done.returncode
        try:
            with tempfile.TemporaryDirectory() as folder:
                print(json.dumps(rehearse(times, Path(folder)), indent=1))
        finally:
            tell("down")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
