"""What a user sees of the main job on a real Slurm: two nodes, two tasks each, gloo on the CPU."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from slurm.processes import started
from tests.slurm.cluster import (
    DEIT,
    DINOV2,
    FOLDER,
    ON_TWO_NODES,
    ROOT,
    experiment,
    said_by,
    start,
    state,
    submitted,
    tell,
    until,
    until_ended,
)

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]


# The main job


def test_training_on_two_nodes_and_an_evaluation_after_it(tmp_path: Path) -> None:
    then = "experiments/eval_deit.py --ngpus 1 probes.accuracy.batch_size=64"
    words = [*DEIT, "training.max_steps=3", "--then", then]
    job, run, log = submitted("train_deit.py", tmp_path / "%j", *words)
    assert until_ended(job, 300, log) == "COMPLETED", log.read_text()
    text = log.read_text()
    assert "step 3/3" in text
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["step"], summary["stopped_by"]) == (3, "training.max_steps")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps[-1] == 3 and sorted(set(steps)) == [1, 2, 3]
    ranks = [(run / "slurm" / f"{job}_{rank}_log.out").read_text() for rank in range(4)]
    assert all(f"global_rank={rank}(4)" in text for rank, text in enumerate(ranks))
    script = (run / "slurm" / f"{job}_submission.sh").read_text()
    assert "--gres=gpu:a100:2" in script

    # What ran was the copy of the code, and it says which.
    (code,) = (run / "code").iterdir()
    assert f"PYTHONPATH={run.parent}/" in script.replace("'", "") and code.name in script
    assert (code / "utils").is_dir() and not (code / "tests").exists()
    head = said_by("git", "-C", str(ROOT), "rev-parse", "HEAD")
    assert (run / "git.txt").read_text().startswith(head)

    listed = json.loads(
        subprocess.run(
            [sys.executable, "-m", "slurm.jobs", "--json", str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    training, evaluation = sorted(listed, key=lambda row: int(row["job"]))
    assert (training["state"], training["step"]) == ("COMPLETED", 3)
    assert (
        training["why"] == f"stopped by training.max_steps at step 3 of {training['total_steps']}"
    )
    results = run / "eval_deit" / "results.json"
    until_ended(evaluation["job"], 120, Path(evaluation["log"]))
    judged = json.loads(results.read_text())["accuracy"]
    assert judged["protocol"]["weights"] == f"{run}/exported/model.safetensors"
    assert 0 <= judged["figures"]["acc1"] <= 100


def test_following_and_cancelling(tmp_path: Path) -> None:
    job, run, log = submitted("train_dinov2.py", tmp_path / "%j", *DINOV2)
    until(lambda: log.is_file() and "step 2/" in log.read_text(), 200, log)
    assert state(job) == "RUNNING"
    done = experiment("train_dinov2.py", run, *ON_TWO_NODES, *DINOV2)
    assert done.returncode == 2 and f"is the run folder of job {job}, RUNNING" in done.stderr
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
    start(function, tmp_path / "%j", "cluster.max_restarts=0")
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
        (["cluster.gpu_type=h100", "-m", "seed=0,1"], "node configuration is not available"),
    ],
)
def test_what_slurm_refuses_is_one_line(
    tmp_path: Path, capsys, words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as left:
        start("steps", tmp_path / "runs" / "%j", *words)
    told = capsys.readouterr()
    assert left.value.code == 2 and told.out == "" and told.err.count("\n") == 1
    assert told.err.startswith("error: Slurm refused the job: ") and said in told.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_no_cluster_is_one_line(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("SLURM_CONF")
    if Path("/etc/slurm/slurm.conf").exists():
        pytest.skip("this machine belongs to a cluster")
    with pytest.raises(SystemExit) as left:
        start("steps", tmp_path)
    told = capsys.readouterr().err
    assert left.value.code == 2 and told.count("\n") == 1 and "is SLURM_CONF set" in told


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
