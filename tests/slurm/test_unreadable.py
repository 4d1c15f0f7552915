"""The list of runs, where a folder cannot be read, and what it takes from the command line."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from slurm import record
from slurm.jobs import list_runs, main
from slurm.launch import submit
from slurm.processes import started
from slurm.runs import describe
from utils.config.build import plain
from utils.config.compose import compose_config
from utils.run_files import LAUNCHES


def run_of(folder: Path, *lines: str) -> Path:
    folder.mkdir(parents=True)
    (folder / LAUNCHES).write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    began = {"event": "began", "job": "", "attempt": 0, "time": 1.0}
    ended = {"event": "ended", "job": "", "attempt": 0, "time": 2.0}
    return run_of(tmp_path / "runs" / "sound", json.dumps(began), json.dumps(ended))


def test_a_folder_that_cannot_be_read_is_a_row(sound: Path, monkeypatch, capsys) -> None:
    barred, iterdir = sound.parent / "barred", Path.iterdir
    barred.mkdir()

    def refuse(folder: Path):  # root may read everything
        if folder == barred:
            raise PermissionError(13, "Permission denied", str(folder))
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", refuse)
    found = {run.folder: (run.state, run.why) for run in list_runs([sound.parent])}
    assert found == {
        sound: ("COMPLETED", ""),
        barred: ("UNREADABLE", "cannot be read: Permission denied"),
    }
    assert main([str(sound.parent)]) == 0 and "UNREADABLE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (LAUNCHES, '{"event": "began"}'),
        (LAUNCHES, '{"event": "failed", "job": null, "attempt": "x", "time": "noon"}'),
        (LAUNCHES, '{"event": ["x"], "time": NaN}'),
        (LAUNCHES, '{"event": "final", "status": null}'),
        ("metrics.jsonl", '{"step": null}'),
        ("metrics.jsonl", '{"step": [1], "loss": "x"}'),
        ("progress.json", '{"total_steps": "many"}'),
        ("summary.json", '{"total_steps": {}, "step": "x", "finished": 7}'),
        ("config.yaml", "\udcff"),
    ],
)
def test_damaged_records_hide_no_other_run(sound: Path, name: str, text: str, capsys) -> None:
    folder = run_of(sound.parent / "damaged", '{"event": "began", "job": "", "host": "x"}')
    (folder / name).write_bytes(os.fsencode(text))
    for words in ([], ["--json"]):
        assert main([*words, str(sound.parent)]) == 0
        told = capsys.readouterr().out
        assert "COMPLETED" in told and "damaged" in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--last", "-3"], "error: --last takes the number of runs to show, 0 for all, not -3\n"),
        (
            ["--state", "nonsense"],
            "error: --state: there is no NONSENSE; a run is RUNNING, PENDING",
        ),
    ],
)
def test_mistakes_are_one_line(sound: Path, capsys, words: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as left:
        main([str(sound.parent), *words])
    assert left.value.code == 2
    told = capsys.readouterr()
    assert told.err.startswith(said) and told.err.count("\n") == 1 and not told.out


def test_a_state_that_no_run_has(sound: Path, capsys) -> None:
    assert main([str(sound.parent), "--state", "fail"]) == 0
    assert capsys.readouterr().out == f"no runs that are FAIL in {sound.parent}\n"


# Rehearsals


def test_a_rehearsal_is_known_by_its_process(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        line = {
            "event": "submitted",
            "job": str(process.pid),
            "executor": "local",
            "log": "the.log",
        }
        here = {"host": socket.gethostname(), "pid": process.pid, "since": started(process.pid)}
        waiting = run_of(tmp_path / "waiting", json.dumps({**line, **here}))
        began = {"event": "began", "job": str(process.pid), "time": 1.0, **here}
        running = run_of(tmp_path / "running", json.dumps(line), json.dumps(began))
        assert [describe(run).state for run in (waiting, running)] == ["RUNNING"] * 2
    finally:
        process.kill()
        process.wait()
    assert describe(waiting).why == "its processes did not start: see the.log"
    assert (describe(running).state, describe(waiting).state) == ("KILLED", "FAILED")
    run_of(tmp_path / "old", json.dumps(line))
    said = {run.folder.name: run.why for run in list_runs([tmp_path])}
    assert said["old"] == f"no word of job {process.pid} here: it was a rehearsal"
    assert not any("sacct" in why for why in said.values())


def test_a_rehearsal_that_is_over_is_completed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    words = [f"output_dir='{tmp_path / 'run'}'", "launcher=slurm", "cluster.executor=local"]
    job = submit("tests.slurm.work.report", plain(compose_config("train.yaml", words)))
    (submitted,) = [x for x in record.read(tmp_path / "run") if x["event"] == "submitted"]
    assert submitted["pid"] == int(job.job_id) and submitted["since"] > 0
    assert job.results() == [0]
    assert describe(tmp_path / "run").state == "COMPLETED"
