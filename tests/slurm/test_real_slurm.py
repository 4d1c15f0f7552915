"""What a user sees of the main job on a real Slurm: two nodes, two tasks each, gloo on the CPU."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from slurm.launch import launch
from slurm.processes import started
from slurm.testbed import lacking
from utils.build import plain
from utils.config import compose_config

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

ROOT = Path(__file__).resolve().parents[2]
# mysqld and munged, which are not root, must get at it: pytest's own folders are for one user.
FOLDER = Path(tempfile.gettempdir()) / "octic-slurm-tests"
TINY = [
    *("backbone.depth=2", "backbone.embed_dim=64", "recipe.batch_size_per_gpu=4", "device=cpu"),
    *("recipe.crops.local_crops_number=1", "recipe.dino_head.num_prototypes=16"),
    *("recipe.dino_head.hidden_dim=16", "training.log_every=1", "~probes.knn"),
]
TWO_BY_TWO = ["launcher=slurm", "cluster=testbed", "launcher.nodes=2", "launcher.gpus_per_node=2"]


def tell(command: str, folder: Path = FOLDER) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "slurm.testbed", command, "--folder", str(folder)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=390)


@pytest.fixture(scope="session")
def standing() -> Iterator[None]:
    """The testbed, for the time of the tests; another run's tests wait for it."""
    if missing := lacking():
        pytest.skip(f"needs {', '.join(missing)}: see docs/launching.md")
    if os.geteuid():
        pytest.skip("needs root, as the daemons of a Slurm do")
    with FileLock(f"{FOLDER}.lock", timeout=300):
        try:
            tell("down")
            done = tell("up")
            assert done.returncode == 0, done.stdout + done.stderr
            yield
        finally:
            tell("down")


@pytest.fixture(autouse=True)
def cluster(standing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", f"{FOLDER}/slurm.conf")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def said_by(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, timeout=60).stdout.strip()


def state(job: str) -> str:
    return said_by("sacct", "-X", "-n", "-P", "-o", "State", "-j", job)


def until(reached: Callable[[], Any], seconds: float, log: Path | None = None) -> None:
    end = time.monotonic() + seconds
    while not reached():
        text = log.read_text() if log and log.is_file() else ""
        assert time.monotonic() < end, f"not within {seconds} s; {text}"
        time.sleep(0.5)


def train(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    flags = ["--cluster", "testbed", "--nodes", "2", "--ngpus", "2", "--output-dir", str(folder)]
    return subprocess.run(
        [sys.executable, "experiments/train_dinov2.py", *flags, *TINY, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )


def submitted(folder: Path, *words: str) -> tuple[str, Path, Path]:
    """The id, the run folder and the log that a submission names."""
    done = train(folder, *words)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    job = lines[0].removeprefix("Submitted job_id: ")
    run = Path(lines[1].removeprefix("Logs and checkpoints will be saved at: "))
    log = Path(lines[2].removeprefix("Follow rank 0: tail -F "))
    assert job.isdigit() and run == folder.parent / job and log.parent.parent == run
    assert lines[3:] == [
        f"State: squeue -j {job}; after its end: sacct -j {job}",
        f"Cancel: scancel {job}",
    ]
    return job, run, log


# The main job


def test_training_on_two_nodes(tmp_path: Path) -> None:
    job, run, log = submitted(tmp_path / "%j", "training.max_steps=3")
    until(lambda: state(job) not in ("", "PENDING", "RUNNING"), 300, log)
    text = log.read_text()
    assert state(job) == "COMPLETED", text
    assert "step 3/3" in text
    assert json.loads((run / "summary.json").read_text())["finished"]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps[-1] == 3 and sorted(set(steps)) == [1, 2, 3]
    ranks = [(run / "slurm" / f"{job}_{rank}_log.out").read_text() for rank in range(4)]
    assert all(f"global_rank={rank}(4)" in text for rank, text in enumerate(ranks))
    assert "--gres=gpu:a100:2" in (run / "slurm" / f"{job}_submission.sh").read_text()


def test_following_and_cancelling(tmp_path: Path) -> None:
    job, _, log = submitted(tmp_path / "%j")
    until(lambda: log.is_file() and "step 2/" in log.read_text(), 200, log)
    assert state(job) == "RUNNING"
    subprocess.run(["scancel", job], check=True, timeout=60)
    until(lambda: state(job).startswith("CANCELLED"), 60, log)
    until(lambda: not said_by("squeue", "-h", "-j", job), 60)
    assert "CANCELLED" in log.read_text()


# Failing on purpose


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("fail_on_second", "error: rank 1 failed: RuntimeError: the second rank has had enough"),
        ("die_on_second", "task 1: Killed"),
        ("refuse", "\nutils.errors.UserError: the moon is in the wrong phase\n"),
    ],
)
def test_one_failure_ends_the_job_and_is_said_in_the_log_of_rank_0(
    tmp_path: Path, capsys, function: str, said: str
) -> None:
    words = [*TWO_BY_TWO, *TINY, f"output_dir='{tmp_path}/%j'"]
    config = plain(compose_config("dinov2/quickstart.yaml", words))
    launch(f"tests.slurm.work.{function}", config)
    job = re.search(r"job_id: (\d+)", capsys.readouterr().out)[1]
    log = tmp_path / job / "slurm" / f"{job}_0_log.out"
    # Without an order to end them, the other ranks would hold their nodes for ten minutes.
    until(lambda: state(job) == "FAILED", 90, log)
    assert said in log.read_text()
    assert function == "fail_on_second" or "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--partition", "nope"], "invalid partition specified: nope"),
        (["--nodes", "9"], "nodes=9"),
        (["cluster.gpu_type=h100"], "Requested node configuration is not available"),
    ],
)
def test_what_slurm_refuses_is_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    done = train(tmp_path / "runs" / "%j", *words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: Slurm refused the job: ") and said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_no_cluster_is_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("SLURM_CONF")
    if Path("/etc/slurm/slurm.conf").exists():
        pytest.skip("this machine belongs to a cluster")
    done = train(tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "is SLURM_CONF set" in done.stderr


# The testbed itself


def pids(folder: Path) -> dict[int, str]:
    return {
        daemon["pid"]: daemon["name"]
        for daemon in json.loads((folder / "testbed.json").read_text())
    }


def test_up_twice_changes_nothing() -> None:
    before = pids(FOLDER)
    assert tell("up").returncode == 0 and pids(FOLDER) == before
    said = tell("status").stdout
    assert "node1 idle" in said and f"export SLURM_CONF={FOLDER}/slurm.conf" in said


def test_a_second_one_breaks_and_goes_alone() -> None:
    """A dead daemon is noticed, `up` mends it, `down` leaves nothing and touches no other."""
    first, folder = pids(FOLDER), Path(tempfile.mkdtemp(prefix="octic-slurm-"))
    try:
        assert tell("up", folder).returncode == 0
        victim = next(pid for pid, name in pids(folder).items() if name == "slurmd")
        os.kill(victim, signal.SIGKILL)
        until(lambda: tell("status", folder).returncode == 1, 20)
        assert "broken: slurmd ended" in tell("status", folder).stdout
        before = pids(folder)
        assert tell("up", folder).returncode == 0
        assert not before.keys() & pids(folder).keys()
        ours = pids(folder)
    finally:
        done = tell("down", folder)
    assert done.stdout == f"down: {folder} is gone\n" and not folder.exists()
    assert not [pid for pid in ours if started(pid)]
    assert pids(FOLDER) == first and tell("status").returncode == 0
    assert tell("down", folder).stdout.startswith("nothing to take down")
