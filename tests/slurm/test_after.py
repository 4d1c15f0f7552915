"""slurm/after.sh: which end of the processes starts a job again, and what it notes."""

import json
import stat
import subprocess
from pathlib import Path

import pytest

from slurm.submission import AFTER

STOPPED = '{"event": "stopped", "job": "7", "attempt": 0, "time": 1, "signal": "SIGTERM"}'
BEGAN = '{"event": "began", "job": "7", "attempt": 0, "time": 0}'
INTERRUPTED = STOPPED.replace("SIGTERM", "SIGINT")
FAILED = '{"event": "failed", "job": "7", "attempt": 0, "time": 1, "rank": 1, "error": "x"}'
EARLIER = FAILED.replace('"attempt": 0', '"attempt": 1').replace('"7"', '"70"')
AGAIN = (
    '{"event": "again", "job": "7", "attempt": 0, "time": 1, "status": 137, '
    '"kind": "%s", "step": "40"}'
)


def end(
    folder: Path,
    status: int,
    *lines: str,
    state: str = "RUNNING",
    refuses: bool = False,
    **variables: str,
) -> tuple[list[str], dict, int]:
    """What scontrol is told, the last line noted, and the exit code of the script."""
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "checkpoints" / "last").write_text("40\n")
    (folder / "run" / "launches.jsonl").write_text("".join(f"{line}\n" for line in lines))
    scontrol = folder / "scontrol"
    scontrol.write_text(
        f'#!/bin/sh\n[ "$1" = show ] && echo "JobId=7 JobState={state} Reason=None"\n'
        f'[ "$1" = requeue ] && echo "$@" >> {folder}/told && exit {int(refuses)}\nexit 0\n'
    )
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    script = f"run={folder}/run max_requeues=3 max_restarts=2\n(exit {status})\n{AFTER.read_text()}"
    env = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "7", **variables}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
    assert not done.stderr
    told = (folder / "told").read_text().splitlines() if (folder / "told").exists() else []
    noted = (folder / "run" / "launches.jsonl").read_text().splitlines()
    return told, json.loads(noted[-1]) if len(noted) > len(lines) else {}, done.returncode


@pytest.mark.parametrize(
    ("status", "lines", "kind"),
    [
        (143, [BEGAN, STOPPED], "stopped"),  # pre-empted
        (140, [BEGAN, STOPPED], "stopped"),  # the time is up
        (140, [], "stopped"),  # while the processes were starting
        (138, [], "stopped"),
        (129, [BEGAN, STOPPED], "stopped"),  # scancel --signal=HUP
        (138, [BEGAN, STOPPED], "stopped"),  # scancel --signal=USR1
        (129, [BEGAN], "killed"),
        (137, [BEGAN], "killed"),
        (137, [BEGAN, STOPPED], "killed"),  # rank 0 was told to leave because another was killed
        (137, [], "killed"),
        (134, [BEGAN], "killed"),
        (75, [BEGAN], "killed"),  # a hung rank: utils/watchdog.py
        (1, [BEGAN], "killed"),  # lost peers alone
        (137, [BEGAN, EARLIER], "killed"),  # of another job, of another attempt
        (137, [BEGAN, AGAIN % "killed"], "killed"),
        (137, [BEGAN, *[AGAIN.replace("40", "20") % "killed"] * 9], "killed"),
        (143, [BEGAN, STOPPED, *[AGAIN % "killed"] * 9], "stopped"),
    ],
)
def test_it_starts_again(tmp_path: Path, status: int, lines: list[str], kind: str) -> None:
    told, noted, code = end(tmp_path, status, *lines)
    assert told == ["requeue 7"] and code == status
    assert (noted["event"], noted["kind"], noted["step"]) == ("again", kind, "40")


@pytest.mark.parametrize(
    ("status", "lines", "kind", "code"),
    [
        (143, [BEGAN, FAILED], "failed", 1),  # the others were told to leave
        (137, [BEGAN, FAILED, STOPPED], "failed", 1),
        (1, [], "unstarted", 1),
        (127, [], "unstarted", 127),
        (130, [BEGAN, INTERRUPTED], "interrupted", 130),
        (137, [BEGAN, *[AGAIN % "killed"] * 2], "killed", 137),
        (140, [BEGAN, STOPPED, *[AGAIN % "stopped"] * 3], "stopped", 140),
    ],
)
def test_it_ends(tmp_path: Path, status: int, lines: list[str], kind: str, code: int) -> None:
    told, noted, left = end(tmp_path, status, *lines)
    assert not told and left == code
    assert (noted["event"], noted["kind"]) == ("final", kind)


def test_success_is_left_to_the_run_to_note(tmp_path: Path) -> None:
    assert end(tmp_path, 0, BEGAN) == ([], {}, 0)


def test_a_job_that_somebody_else_ended_is_left_alone(tmp_path: Path) -> None:
    for number, state in enumerate(("CANCELLED", "PENDING", "TIMEOUT")):
        told, noted, _ = end(tmp_path / str(number), 143, BEGAN, STOPPED, state=state)
        assert not told and noted["event"] == "final"


def test_a_cluster_that_does_not_requeue_is_told_of(tmp_path: Path) -> None:
    told, noted, code = end(tmp_path, 140, BEGAN, STOPPED, refuses=True)
    assert told and code == 140 and noted["kind"] == "refused"


@pytest.mark.parametrize("status", [137, 140])
def test_a_restart_that_cannot_be_noted_is_none(tmp_path: Path, status: int) -> None:
    """It would not be counted, so the job would start again without end."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho JobId=7 JobState=RUNNING x; echo $1 >> {tmp_path}/told\n")
    scontrol.chmod(0o755)
    script = f"run={tmp_path}/gone max_requeues=3 max_restarts=2\n(exit {status})\n"
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    command = ["bash", "-c", script + AFTER.read_text()]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (tmp_path / "told").read_text() == "show\n" and done.returncode == status
    assert "error: job 7: noting that or Slurm's requeue failed: it is given up" in done.stdout


def test_a_job_of_an_array_has_its_own_record_and_requeues_itself(tmp_path: Path) -> None:
    """Its lines are under the array's id and its number; Slurm knows it by an id of its own."""
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
    told, noted, _ = end(tmp_path / "a", 143, STOPPED.replace('"7"', '"5_3"'), **array)
    assert told == ["requeue 7"] and (noted["kind"], noted["job"]) == ("stopped", "5_3")
    told, noted, _ = end(tmp_path / "b", 1, FAILED.replace('"7"', '"5_4"'), BEGAN, **array)
    assert not told and noted["kind"] == "unstarted", "what another job of the array noted"


def test_what_was_noted_in_an_earlier_attempt_does_not_count(tmp_path: Path) -> None:
    again = {"SLURM_RESTART_COUNT": "1"}
    told, noted, _ = end(tmp_path / "a", 137, BEGAN, FAILED, STOPPED, **again)
    assert told and (noted["kind"], noted["attempt"]) == ("killed", 1)
    now = FAILED.replace('"attempt": 0', '"attempt": 1')
    told, noted, code = end(tmp_path / "b", 137, BEGAN, now, **again)
    assert not told and noted["kind"] == "failed" and code == 1


def test_what_other_ranks_noted_counts_and_a_first_checkpoint_may_be_missing(
    tmp_path: Path,
) -> None:
    script = f"run={tmp_path} max_requeues=3 max_restarts=2\n(exit 137)\n{AFTER.read_text()}"
    env = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    (tmp_path / "launches.rank1.jsonl").write_text(FAILED + "\n")
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
    noted = json.loads((tmp_path / "launches.jsonl").read_text())
    assert done.returncode == 1 and (noted["kind"], noted["step"]) == ("failed", "none")
