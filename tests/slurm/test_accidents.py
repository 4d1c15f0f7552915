"""Accidents on a real Slurm: a run ends as if nothing had happened, or says why not."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from slurm import record
from slurm.jobs import list_runs
from slurm.runs import Run
from tests.slurm.cluster import (
    DINOV2,
    events,
    said_by,
    start,
    train,
    until,
    until_ended,
)

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900), pytest.mark.usefixtures("cluster")]


def job_of(capsys) -> str:
    return re.search(r"job_id: (\d+)", capsys.readouterr().out)[1]


def listed(folder: Path) -> dict[str, Run]:
    return {str(run.folder.relative_to(folder)): run for run in list_runs([folder])}


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_preempted_and_a_killed_run_end_in_the_weights_of_an_undisturbed_one(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    """The undisturbed one is urgent and takes the nodes of the other: Slurm's own pre-emption."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = [
        *DINOV2,
        "training.max_steps=10",
        "checkpoint.every=3",
        "recipe.num_workers=1",
        "logging.wandb=true",
    ]
    run, calm = tmp_path / "disturbed", tmp_path / "calm"
    train("train_dinov2", run, *words)
    job = job_of(capsys)
    log = run / "slurm" / f"{job}_0_log.out"
    until(lambda: log.is_file() and "step 2/" in log.read_text(), 200, log)

    train("train_dinov2", calm, *words, "cluster.cpus_per_task=2", "--partition", "urgent")
    urgent = job_of(capsys)
    calm_log = calm / "slurm" / f"{urgent}_0_log.out"
    assert until_ended(urgent, 300, calm_log) == "COMPLETED", calm_log.read_text()
    assert events(run)[:3] == ["began", "stopped", "again"]

    resumed = r"resuming from step \d+[\s\S]*^step \d+/10 "
    until(lambda: re.search(resumed, log.read_text(), re.MULTILINE), 300, log)
    (began,) = [line for line in record.read(run) if line["event"] == "began"][1:]
    os.kill(began["pid"], signal.SIGKILL)  # as the kernel does for want of memory
    assert until_ended(job, 300, log) == "COMPLETED", log.read_text()

    assert events(run) == ["began", "stopped", "again", "began", "again", "began", "ended"]
    assert events(calm) == ["began", "ended"]
    ends = [load_file(folder / "exported" / "model.safetensors") for folder in (run, calm)]
    assert ends[0].keys() == ends[1].keys()
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[0])
    assert losses(run) == losses(calm) and list(losses(calm)) == list(range(1, 11))
    curve = (run / "wandb_id.txt").read_text().strip()
    assert len(list((run / "wandb").glob(f"offline-run-*-{curve}"))) == 3
    assert len(list((run / "wandb").glob("offline-run-*"))) == 3
    assert listed(tmp_path)["disturbed"].restarts == 2


def test_time_limit_kill_interrupt_crash_loop_and_a_node_that_fails(tmp_path: Path, capsys) -> None:
    # Slurm looks at time limits twice a minute: other things happen meanwhile.
    limits = ["--timeout", "1", "cluster.signal_delay_s=5", "training.max_steps=285"]
    one = ["--nodes", "1"]
    start("steps", tmp_path / "limit", *one, *limits, "--exclude", "node2")
    limit = job_of(capsys)
    start("steps", tmp_path / "kill", *one, "name=kill", "training.max_steps=10")
    kill = job_of(capsys)
    start("die_on_second", tmp_path / "doomed", *one, "cluster.max_restarts=1")
    doomed = job_of(capsys)
    start("steps", tmp_path / "stopped", *one, "--exclude", "node1", "training.max_steps=1000")
    stopped = job_of(capsys)
    until((tmp_path / "stopped/checkpoints/last").is_file, 120)
    subprocess.run(["scancel", "--signal=INT", stopped], check=True, timeout=60)

    assert until_ended(kill, 200) == "COMPLETED"
    # The first rank may have noted that it was told to leave when the second had been killed.
    noted = [event for event in events(tmp_path / "kill") if event != "stopped"]
    assert noted == ["began", "again", "began", "ended"]
    log = (tmp_path / "kill" / "slurm" / f"{kill}_0_log.out").read_text()
    assert f"job {kill}: killed (status 137); it starts again from checkpoint " in log
    code = next((tmp_path / "kill" / "code").iterdir())
    (first, used), (second, used_again) = re.findall(r"begins at step (\d+) with (\S+)", log)
    assert first == "0" and int(second) > 0
    assert used == used_again == f"{code}/slurm/record.py"

    assert until_ended(doomed, 200) == "FAILED" and until_ended(stopped, 100) == "FAILED"
    told = [event for event in events(tmp_path / "doomed") if event in ("again", "final")]
    assert told == ["again", "final"]

    start("steps", tmp_path / "node", "training.max_steps=40")
    job = job_of(capsys)
    until((tmp_path / "node/checkpoints/last").is_file, 100)
    update = ["scontrol", "update", "NodeName=node2"]
    try:
        subprocess.run([*update, "State=DOWN", "Reason=test"], check=True, timeout=60)
        until(lambda: "PENDING" in said_by("squeue", "-h", "-o", "%T", "-j", job), 60)
        assert "waits: " in listed(tmp_path)["node"].why
    finally:  # it may have come back by itself
        subprocess.run([*update, "State=RESUME"], timeout=60, capture_output=True)
    assert until_ended(job, 200) == "COMPLETED"
    log = (tmp_path / "node" / "slurm" / f"{job}_0_log.out").read_text()
    first, second = re.findall(r"begins at step (\d+)", log)
    assert first == "0" and int(second) > 0

    assert until_ended(limit, 300) == "COMPLETED"
    assert events(tmp_path / "limit")[:3] == ["began", "stopped", "again"]
    assert events(tmp_path / "limit")[-1] == "ended"

    runs = listed(tmp_path)
    assert runs["limit"].restarts >= 1 and runs["kill"].why == "1 restart"
    lost = "a process was killed (out of memory?), before a checkpoint; 1 restart"
    assert runs["doomed"].why == lost
    assert re.match(r"interrupted, saved at checkpoint \d+", runs["stopped"].why)
    assert runs["node"].why == "1 restart (after node failure)"


def test_a_sweep_is_a_job_array_and_what_follows_a_failure_is_cancelled(
    tmp_path: Path, capsys
) -> None:
    script = tmp_path / "judge.py"
    script.write_text(
        "from functools import partial\n"
        "from slurm.command import main\n"
        "from utils.config.compose import parse_config\n"
        "parse = partial(parse_config, 'dinov2/quickstart.yaml')\n"
        "main('tests.slurm.work.mark', parse)\n"
    )
    words = ["-m", "recipe.schedules.lr=1e-3,2e-3", "recipe.drop_path_rate=0,0.1"]
    more = ["training.max_steps=5", "cluster.array_parallelism=2", "--nodes", "1"]
    start("fail_at_high_rates", tmp_path / "%j", *words, *more, "--then", f"{script} --ngpus 1")
    said = capsys.readouterr().out
    job = re.search(r"job_id: (\d+)", said)[1]
    after = re.search(rf"Then job (\d+), if {job} succeeds: ", said)[1]
    folder = tmp_path / job
    points = [f"lr={lr},drop_path_rate={rate}" for lr in ("0.001", "0.002") for rate in (0, 0.1)]
    for index, point in enumerate(points):
        assert re.search(rf"{job}_{index}\b.*", said) and point in said.replace("\n", "")
    until(lambda: len(said_by("squeue", "-h", "-o", "%i").split()) == 0, 200)

    runs = listed(folder)
    assert [runs[point].state for point in points] == ["COMPLETED", "COMPLETED", "FAILED", "FAILED"]
    assert runs[points[3]].why.endswith("RuntimeError: this learning rate is too high")
    for point, expected in zip(points, ["COMPLETED"] * 2 + ["CANCELLED"] * 2, strict=True):
        judged = runs[f"{point}/judge"]
        assert judged.state == expected and judged.job.startswith(f"{after}_")
    why = runs[f"{points[3]}/judge"].why
    assert why == f"did not start: job {job}, which it was to follow, did not succeed"
    assert (folder / points[0] / "judge" / "mark.txt").is_file()
    assert "--array=0-3%2" in (folder / "slurm" / f"{job}_submission.sh").read_text()
