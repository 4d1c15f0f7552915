"""The rehearsals of docs/reliability.md, few of each; the command runs them by the hundred."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.rehearsal.configs import judge
from tests.rehearsal.forks import Outcome
from tests.rehearsal.images import CORRUPTIONS, good_files, read_all, write_corrupted

ROOT = Path(__file__).parents[2]


def rehearse(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.rehearsal", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_killed_runs_end_as_undisturbed():
    assert "kills: 3 " in rehearse("kills", "--count", "3")


@pytest.mark.slow
def test_two_killed_processes_end_as_undisturbed():
    assert "kills: 4 " in rehearse("kills", "--count", "4", "--processes", "2", "--seed", "7")


@pytest.mark.slow
def test_mutated_configs_run_or_are_refused_in_one_line():
    said = rehearse("configs", "--count", "10", "--seed", "5")
    assert "configs: 10 " in said and "faults: 0 " in said


@pytest.mark.slow
def test_trainings_on_corrupted_images_stop_with_one_line_or_go_on():
    assert "faults: 0 " in rehearse("images", "--count", "60", "--seed", "5")


def test_corrupted_images_are_read_or_refused_in_one_line(tmp_path, capfd):
    paths = write_corrupted(90, tmp_path, seed=3)
    capfd.readouterr()
    read_all(paths)
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 90 and not [line for line in lines if line.startswith("FAULT")]
    assert {line.split()[0] for line in lines} == {"read", "refused"}
    assert len(CORRUPTIONS) == 6 and len(good_files()) == 13


def test_the_judge_of_configs_tells_a_traceback_from_a_line():
    line = "error: seed must be a whole number, got 'x'\n"
    assert judge(Outcome(2, "", line, 1.0)) == "refused"
    assert judge(Outcome(0, "", "", 1.0)) == "ran"
    assert judge(Outcome(2, "", line * 2, 1.0)).startswith("unclear")
    assert judge(Outcome(1, "", line, 1.0)).startswith("unclear")
    assert judge(Outcome(2, "", "Traceback (most recent call last):\nKeyError: 1\n", 1.0)) == (
        "traceback: KeyError: 1"
    )
    assert judge(Outcome(None, "", "", 9.0)).startswith("hung")
