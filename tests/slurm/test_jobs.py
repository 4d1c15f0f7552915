"""The list of runs: what a folder alone tells, and what Slurm adds."""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from slurm import jobs, record
from slurm.jobs import judge, list_runs, main
from slurm.processes import started
from slurm.runs import Run, describe
from utils.errors import UserError
from utils.run_files import LAUNCHES


def lines(folder: Path, *events: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LAUNCHES).open("a") as file:
        for number, event in enumerate(events):
            whole = {"job": "", "attempt": 0, "time": 100.0 + number, **event}
            file.write(json.dumps(whole) + "\n")
    return folder


def trained(folder: Path, step: int, total: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": step, "loss": 2.5, "lr": 0.1}, {"step": step, "knn/top1": 81.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "progress.json").write_text(json.dumps({"first_step": 0, "total_steps": total}))
    (folder / "config.yaml").write_text("name: mine\nseed: 0\n")


BEGAN = {"event": "began", "host": "elsewhere", "pid": 1, "since": 1}
ME = {"host": socket.gethostname(), "pid": os.getpid(), "since": started(os.getpid())}


@pytest.mark.parametrize(
    ("events", "state", "why"),
    [
        ([BEGAN, {"event": "ended"}], "COMPLETED", ""),
        ([BEGAN | ME], "RUNNING", ""),
        ([BEGAN | ME | {"since": 1}], "KILLED", "it left no word: killed, or the machine stopped"),
        ([BEGAN, {"event": "stopped", "signal": "SIGINT"}], "STOPPED", "told to stop by SIGINT"),
        (
            [BEGAN, {"event": "failed", "rank": 3, "error": "ValueError: x"}],
            "FAILED",
            "rank 3: ValueError: x",
        ),
        (
            [BEGAN, {"event": "failed", "rank": 0, "error": "a"}, BEGAN, {"event": "ended"}],
            "COMPLETED",
            "",
        ),
        (
            [
                BEGAN | ME,
                BEGAN | {"attempt": 5},
                {"event": "failed", "attempt": 5, "error": "runs/x is in use by process 1"},
            ],
            "RUNNING",
            "",
        ),
        (
            [
                BEGAN,
                {"event": "again", "kind": "killed", "status": 137, "step": "none"},
                {"event": "final", "attempt": 1, "kind": "killed", "status": 143, "step": "none"},
            ],
            "FAILED",
            "a process was killed or ended, before a checkpoint",
        ),
    ],
)
def test_local_runs(tmp_path: Path, events: list[dict], state: str, why: str) -> None:
    run = describe(lines(tmp_path, *events))
    assert run.state == state and run.why.startswith(why) and bool(run.why) == bool(why)


@pytest.mark.parametrize(
    ("final", "why"),
    [
        (
            {"kind": "killed", "status": 137, "step": "40"},
            "a process was killed (out of memory?), at checkpoint 40",
        ),
        (
            {"kind": "unstarted", "status": 1, "step": "none"},
            "the processes did not start (status 1)",
        ),
        (
            {"kind": "stopped", "status": 140, "step": "4"},
            "told to stop (pre-emption or time limit)",
        ),
        (
            {"kind": "killed", "status": 75, "step": "4"},
            "no step finished for 900 s: rank 2 is behind",
        ),
    ],
)
def test_what_the_batch_script_saw(tmp_path: Path, final: dict, why: str) -> None:
    hang = tmp_path / "hangs" / "7" / "line.txt"
    hang.parent.mkdir(parents=True)
    hang.write_text("no step finished for 900 s: rank 2 is behind\n")
    job = {"job": "12"}
    run = describe(
        lines(
            tmp_path,
            job | {"event": "submitted", "name": "x"},
            BEGAN | job,
            job | {"event": "final", **final},
        )
    )
    assert run.job == "12" and run.why.startswith(why)


def test_a_run_of_before_there_were_records(tmp_path: Path) -> None:
    trained(tmp_path, 7, 10)
    assert describe(tmp_path).state == "UNKNOWN"
    (tmp_path / "summary.json").write_text(json.dumps({"finished": True, "seconds": 5}))
    run = describe(tmp_path)
    assert (run.state, run.name, run.step, run.total) == ("COMPLETED", "mine", 7, 10)
    assert run.metrics == {"loss": 2.5, "knn/top1": 81.0} and run.seconds == 5


def test_the_list_finds_runs_and_no_parts_of_them(tmp_path: Path, capsys) -> None:
    trained(tmp_path / "a", 7, 10)
    (tmp_path / "a" / "linear").mkdir()
    (tmp_path / "a" / "linear" / "results.json").write_text("{}")
    trained(tmp_path / "a" / "code" / "hidden", 1, 2)
    trained(tmp_path / "sweep" / "lr=1", 1, 2)
    lines(tmp_path / "a" / "eval", BEGAN, {"event": "ended"})
    assert main(["--json", str(tmp_path)]) == 0
    found = {
        Path(row["folder"]).relative_to(tmp_path).as_posix()
        for row in json.loads(capsys.readouterr().out)
    }
    assert found == {"a", "sweep/lr=1", "a/eval"}
    assert main([str(tmp_path), "--last", "1"]) == 0
    told = capsys.readouterr().out
    assert "run folder" in told and told.count("mine") <= 1
    assert main([str(tmp_path)]) == 0 and "7/10" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main([str(tmp_path / "nothing")])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: there is no folder ")


@pytest.mark.parametrize(
    ("facts", "state", "why"),
    [
        (
            {"State": "TIMEOUT", "Timelimit": "1-00:00:00"},
            "TIMEOUT",
            "met the time limit (1-00:00:00)",
        ),
        ({"State": "OUT_OF_MEMORY"}, "OUT_OF_MEMORY", "a node ran out of the memory asked for"),
        ({"State": "NODE_FAIL", "NodeList": "n7"}, "NODE_FAIL", "a node failed (n7)"),
        ({"State": "CANCELLED by 0", "ElapsedRaw": "9"}, "CANCELLED", "cancelled by root"),
        ({"State": "FAILED", "ExitCode": "3:0"}, "FAILED", "exit code 3:0: see the.log"),
        ({"State": "FAILED"}, "FAILED", "it failed: see the.log"),
        ({"State": "PENDING", "Reason": "Priority"}, "PENDING", "waits: Priority"),
        ({"State": "COMPLETED"}, "COMPLETED", ""),
    ],
)
def test_what_slurm_adds(facts: dict, state: str, why: str) -> None:
    run = Run(Path("x"), job="12", log="the.log")
    judge(run, facts)
    assert run.state == state and run.why.startswith(why) and bool(run.why) == bool(why)


def test_a_cancelled_follower_names_the_job_that_did_not_succeed(tmp_path: Path) -> None:
    run = describe(lines(tmp_path, {"event": "submitted", "job": "13", "after": "afterok:12"}))
    judge(run, {"State": "CANCELLED", "ElapsedRaw": "0"})
    assert run.why == "did not start: job 12, which it was to follow, did not succeed"


def test_a_job_that_starts_again_tells_how_often_and_why(tmp_path: Path) -> None:
    job, saved = {"job": "12"}, "told to stop (pre-emption or time limit), saved at checkpoint 4"
    begin = {**BEGAN, **job}

    def seen(*events: dict, **facts: str) -> tuple[Run, str]:
        run = describe(lines(tmp_path, *events))
        said = run.why
        judge(run, facts)
        return run, said

    again = {"event": "again", **job, "kind": "stopped", "status": 140, "step": "4"}
    run, said = seen(
        {"event": "submitted", **job}, begin, again, State="PENDING", Reason="Priority"
    )
    assert (run.state, said) == ("PENDING", f"{saved}; starts again")
    assert run.why == f"waits: Priority; {said}" and run.restarts == 0
    run, _ = seen({**begin, "attempt": 1}, State="RUNNING", Earlier="pre-emption", ElapsedRaw="7")
    assert (run.why, run.restarts, run.seconds) == ("1 restart (after pre-emption)", 1, 7.0)
    ended = {"event": "ended", **job, "attempt": 2}
    run, _ = seen({**begin, "attempt": 2}, ended, State="COMPLETED")
    assert (run.state, run.why) == ("COMPLETED", "2 restarts")


def test_the_newest_run_stands_last(tmp_path: Path, capsys) -> None:
    for name, when in (("b", 100), ("c", 300), ("a", 200)):
        lines(tmp_path / name, BEGAN, {"event": "ended"})
        for path in (tmp_path / name / LAUNCHES, tmp_path / name):
            os.utime(path, (when, when))
    shown = []
    for last in ("0", "2"):
        assert main(["--json", "--last", last, str(tmp_path)]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert {row["seconds"] for row in rows} == {1.0}
        shown.append([row["name"] for row in rows])
    assert shown == [["b", "a", "c"], ["a", "c"]]


@pytest.mark.parametrize(
    ("event", "why"),
    [
        ({"event": "stopped", "signal": "SIGTERM"}, "cancelled by root, saved at checkpoint 7"),
        ({"event": "lost_peer", "error": "x"}, "cancelled by root"),
    ],
)
def test_of_a_cancelled_run_what_it_saved_is_told(tmp_path: Path, event: dict, why: str) -> None:
    trained(tmp_path, 7, 10)
    run = describe(lines(tmp_path, {**BEGAN, "job": "12"}, {**event, "job": "12"}))
    judge(run, {"State": "CANCELLED by 0", "ElapsedRaw": "9"})
    assert (run.state, run.why) == ("CANCELLED", why)


def test_slurms_two_answers_are_joined(monkeypatch) -> None:
    answers = {
        "sacct": [
            "12|NODE_FAIL|0:0|60|1:00|n1",
            "12|REQUEUED|0:0|60|1:00|n1",
            "12|RUNNING|0:0|5|1:00|n1",
            "14_0|COMPLETED|0:0|5|1:00|n1",
        ],
        "squeue": ["12|RUNNING|None", "14_1|PENDING|JobArrayTaskLimit"],
    }
    monkeypatch.setattr(jobs, "_ask", lambda words: answers[words[0]])
    found = jobs.ask_slurm(["12", "14_0", "14_1"])
    assert found["12"]["State"] == "RUNNING" and found["12"]["Earlier"] == "node failure"
    assert found["14_1"]["Reason"] == "JobArrayTaskLimit"


def test_what_became_of_a_job_is_known_before_the_accounting_is_told(monkeypatch) -> None:
    answers = {
        "sacct": [
            "15_0|COMPLETED|0:0|65|1:00|n1",
            "15_1|RUNNING|0:0|60|1:00|n1",
            "15_2|PENDING|0:0|0|1:00|",
        ],
        "squeue": [
            "15_0|COMPLETED|None|1:04|1:00|n1",
            "15_1|TIMEOUT|TimeLimit|1:02|1:00|n1",
            "15_2|CANCELLED|DependencyNeverSatisfied|0:00|1:00|",
            "15_3|FAILED|NonZeroExitCode|1-02:03:04|2-00:00:00|n1",
        ],
    }
    monkeypatch.setattr(jobs, "_ask", lambda words: answers[words[0]])
    found = jobs.ask_slurm([f"15_{task}" for task in range(4)])
    said = [(found[f"15_{task}"]["State"], found[f"15_{task}"]["ElapsedRaw"]) for task in range(4)]
    expected = [("COMPLETED", "65"), ("TIMEOUT", "62"), ("CANCELLED", "0"), ("FAILED", "93784")]
    assert said == expected


def test_without_a_slurm_a_job_is_known_by_its_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    lines(tmp_path / "run", {"event": "submitted", "job": "12", "name": "x"})
    (run,) = list_runs([tmp_path])
    assert run.state == "UNKNOWN" and "ask sacct" in run.why


@pytest.mark.parametrize(("code", "state"), [(0, "TIMEOUT"), (1, "UNKNOWN")])
def test_what_a_command_prints_before_it_fails_is_no_answer(tmp_path, monkeypatch, code, state):
    for name, line in (("sacct", f"echo '12|TIMEOUT|0:0|60|1:00|n1'; exit {code}"), ("squeue", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    lines(tmp_path / "run", {"event": "submitted", "job": "12", "name": "x"})
    (run,) = list_runs([tmp_path])
    assert run.state == state


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[../gloo/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5"), True),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (UserError("a Broken pipe in a user's words"), False),
        (UserError("DataLoader worker (pid(s) 7) exited unexpectedly: usually"), True),
    ],
)
def test_the_error_of_a_rank_that_lost_another_is_no_failure_of_its_own(
    tmp_path: Path, error: Exception, lost: bool
) -> None:
    with pytest.raises(type(error)), record.attempt(tmp_path):
        raise error
    assert record.read(tmp_path)[-1]["event"] == ("lost_peer" if lost else "failed")


def attempt(folder: Path, error: Exception | None = None, *, steps: bool = True, **facts) -> None:
    """A start in a process of its own: a step, which leaves progress.json, then the error."""
    with suppress(Exception), record.attempt(folder, **facts):
        if steps:
            (folder / "progress.json").unlink(missing_ok=True)
            (folder / "progress.json").write_text(json.dumps({"total_steps": 12}))
        if error:
            raise error


MISTAKE = UserError("runs/x holds a run at step 4: choose another output_dir")


@pytest.mark.parametrize("job", ["", "13"])
def test_a_refused_start_leaves_what_an_earlier_one_came_to(tmp_path: Path, monkeypatch, job):
    pids = iter(range(1000, 2000))
    monkeypatch.setattr(os, "getpid", lambda: next(pids))
    monkeypatch.setattr(record, "started", lambda pid: 7)
    attempt(tmp_path)
    before = describe(tmp_path)
    attempt(tmp_path, MISTAKE, steps=False, job=job)
    after = describe(tmp_path)
    for field in ("state", "why", "seconds", "job", "restarts", "lines"):
        assert getattr(after, field) == getattr(before, field), field
    assert after.state == "COMPLETED" and after.refusal == str(MISTAKE)
    # One that made steps has failed, and so has one that fell over something else.
    attempt(tmp_path, UserError("not finite at step 6, 7"), job=job and "14")
    assert (describe(tmp_path).state, describe(tmp_path).refusal) == ("FAILED", "")
    attempt(tmp_path, job=job and "15")
    attempt(tmp_path, RuntimeError("x"), steps=False, job=job and "16")
    assert describe(tmp_path).why == "RuntimeError: x"


def test_a_first_start_that_is_refused_has_failed(tmp_path: Path) -> None:
    for error in (UserError("no such file"), MISTAKE):
        attempt(tmp_path, error, steps=False)
        assert describe(tmp_path).state == "FAILED" and describe(tmp_path).why == str(error)


def test_a_second_command_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    """Both without a job: the processes tell them apart."""
    folder = lines(tmp_path, BEGAN | ME, BEGAN)
    lines(folder, BEGAN | {"event": "failed", "error": "runs/x is in use by process 1"})
    assert describe(folder).state == "RUNNING"
    lines(folder, ME | {"event": "ended"})
    assert describe(folder).state == "COMPLETED"


def test_a_job_that_starts_again_and_is_refused_then_has_failed(tmp_path, monkeypatch) -> None:
    attempt(tmp_path, RuntimeError("Connection closed by peer"), job="12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    attempt(tmp_path, UserError("no sound checkpoint in x"), steps=False, job="12")
    assert describe(tmp_path).why == "no sound checkpoint in x"


def test_steps_that_were_asked_for_are_a_completed_attempt(tmp_path: Path) -> None:
    trained(tmp_path, 10, 616)
    summary = {"finished": False, "stopped_by": "training.max_steps", "step": 10, "seconds": 5}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    said = ("COMPLETED", "stopped by training.max_steps at step 10 of 616")
    assert (describe(tmp_path).state, describe(tmp_path).why) == said
    run = describe(lines(tmp_path, BEGAN, {"event": "ended"}))
    assert (run.state, run.why) == said
    trained(tmp_path, 616, 616)
    assert (describe(tmp_path).state, describe(tmp_path).why) == ("COMPLETED", "")


@pytest.mark.parametrize(
    ("ranges", "among"),
    [("0-3%2]", {0, 1, 2, 3}), ("2,5-6]", {2, 5, 6}), ("7]", {7}), ("0,2,4,...]", set(range(9)))],
)
def test_an_array_that_waits_as_a_whole_speaks_for_its_own_tasks(ranges, among, monkeypatch):
    """Slurm may not have told yet what became of the others."""

    def said(words: list[str]) -> list[str]:
        values = {"JobID": f"12_[{ranges}", "State": "CANCELLED by 0"}
        line = "|".join(values.get(key, "") for key in jobs._SACCT.split(","))
        return [line] if words[0] == "sacct" else []

    monkeypatch.setattr(jobs, "_ask", said)
    found = jobs.ask_slurm([f"12_{task}" for task in range(9)])
    assert {task for task in range(9) if f"12_{task}" in found} == among


def test_a_comparison_shows_a_figure_of_each_net(tmp_path: Path) -> None:
    nets = {"plain": {"accuracy": 90.0, "method": "-"}, "plain + tome": {"accuracy": 85.5}}
    content = {"reduction": {"protocol": {}, "figures": nets}}
    (tmp_path / "results.json").write_text(json.dumps(content))
    shown = jobs.chosen_figures(describe(tmp_path))
    assert shown == {"plain/accuracy": 90.0, "plain + tome/accuracy": 85.5}
