"""Read the state of a run from its folder: progress, last figures, and why it ended."""

import json
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slurm import record
from utils.endings import HUNG, MAX_STEPS
from utils.lock import STALE_S
from utils.proc import started
from utils.run_files import CHECKPOINTS, CONFIG, LAUNCHES, LOCK, METRICS, PROGRESS, RESULTS, SUMMARY

# Folders inside a run folder that contain no runs.
_INSIDE = {"code", CHECKPOINTS, "slurm", "logs", "hangs", "exported", "wandb", "__pycache__"}
MAX_DEPTH = 5
UNREADABLE = "UNREADABLE"


@dataclass
class Run:
    """One run folder, as a row of the list."""

    folder: Path
    name: str = ""
    job: str = ""
    state: str = "UNKNOWN"
    why: str = ""
    step: int | None = None
    total: int | None = None
    seconds: float | None = None
    restarts: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    log: str = ""
    refusal: str = ""  # why the newest start was refused; such a start changes nothing
    changed: float = 0.0
    lines: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @property
    def attempt(self) -> list[dict[str, Any]]:
        """The lines of the newest attempt."""
        begins = [i for i, line in enumerate(self.lines) if line["event"] in ("began", "submitted")]
        newest = self.lines[begins[-1] :] if begins else self.lines
        # If its processes died before they wrote `began`, it has only later lines.
        last = max((line["attempt"] for line in newest), default=0)
        return [line for line in newest if line["attempt"] == last]


def find(places: list[Path]) -> list[Run]:
    """All runs in these folders and below them, the most recently changed one last."""
    folders = {folder.resolve(): folder for place in places for folder in _folders(place)}
    return sorted((describe(folder) for folder in folders.values()), key=lambda run: run.changed)


def describe(folder: Path) -> Run:
    """The run of a folder, with its state as far as the folder alone shows it.

    An unreadable or damaged folder gives a run in the state UNREADABLE instead of an error, so that
    a list of runs still shows the others.
    """
    try:
        if folder.is_dir():
            next(folder.iterdir(), None)  # glob would silently skip an unreadable folder
        return _described(folder)
    except OSError as error:
        why = f"cannot be read: {error.strerror or error}"
    except Exception as error:  # a damaged file can lead to any error
        why = f"its files are damaged: {record.in_one_line(error)}"
    return Run(folder, folder.name, state=UNREADABLE, why=why)


def _described(folder: Path) -> Run:
    lines = record.read(folder)
    run = Run(folder, lines=_current(lines))
    if lines and run.lines[-1:] != lines[-1:]:
        refused = [line for line in lines if _is_refused(line)]
        run.refusal = _whose(refused[-1]) if refused else ""
    submitted = [line for line in run.lines if line["event"] == "submitted"]
    run.job = next((line["job"] for line in reversed(run.lines) if line["job"]), "")
    run.log = next((line.get("log", "") for line in reversed(submitted)), "")
    run.restarts = max((line["attempt"] for line in run.lines if line["job"] == run.job), default=0)
    summary, config = _json(folder / SUMMARY), _head_of_config(folder)
    progress = _json(folder / PROGRESS)
    run.name = str(
        next((x["name"] for x in (config, summary, *submitted) if x.get("name")), folder.name)
    )
    run.step, run.metrics = _last_metrics(folder)
    total = progress.get("total_steps") or summary.get("total_steps")
    run.total = int(total) if total else None
    _judge(run, summary)
    files = [folder, *folder.glob("*.json*")]
    run.changed = (
        max(path.stat().st_mtime for path in files if path.exists()) if folder.exists() else 0.0
    )
    return run


def _folders(place: Path, depth: int = 0, *, inside: bool = False) -> Iterator[Path]:
    try:
        if not place.is_dir():
            return
        has = {path.name for path in place.iterdir()}
    except OSError:
        yield place  # its row in the list says why
        return
    is_run = LAUNCHES in has or {CONFIG, METRICS} <= has
    # The files of a probe inside a run folder are no run.
    is_run = is_run or not inside and bool({SUMMARY, RESULTS} & has)
    if is_run:
        yield place
    if depth < MAX_DEPTH:
        for name in sorted(has - _INSIDE):
            if not name.startswith("."):
                yield from _folders(place / name, depth + 1, inside=inside or is_run)


def _current(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines without those of refused starts; all lines if there was no other start.

    A refused start changed nothing: another process was using the folder, or the user had made a
    mistake.
    """
    starts = _starts(lines)
    refused = {start for line, start in zip(lines, starts, strict=True) if _is_refused(line)}
    left = [line for line, start in zip(lines, starts, strict=True) if start not in refused]
    return left or lines


def _is_refused(line: Mapping[str, Any]) -> bool:
    if line["event"] != "failed":
        return False
    # A job that is refused after a restart by Slurm has failed.
    mistaken = line.get("refused") and not line["attempt"]
    return bool(mistaken or " is in use by " in str(line.get("error")))


def _starts(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """For each line a key of its start: job and attempt, or the process if there is no job."""
    starts: list[tuple[Any, ...]] = []
    began: dict[int, tuple[Any, ...]] = {}  # by attempt, for lines that do not name their process
    for line in lines:
        if line["job"]:
            starts.append((line["job"], line["attempt"]))
        elif "pid" in line:
            starts.append((line.get("host"), line["pid"], line.get("since")))
            if line["event"] == "began":
                began[line["attempt"]] = starts[-1]
        else:
            starts.append(began.get(line["attempt"], ("", line["attempt"])))
    return starts


def _judge(run: Run, summary: Mapping[str, Any]) -> None:
    attempt = run.attempt
    events = {line["event"]: line for line in attempt}
    began = events.get("began")
    ends = [e for e in ("failed", "stopped", "ended", "final", "again", "lost_peer") if e in events]
    if began:
        last = max((events[end]["time"] for end in ends), default=None)
        run.seconds = (last or time.time()) - began["time"]
    if "ended" in events and not {"failed", "lost_peer"} & set(events):
        run.state, run.why = "COMPLETED", _left_early(run, summary)
    elif "failed" in events:
        first = next(line for line in attempt if line["event"] == "failed")
        run.state, run.why = "FAILED", _whose(first)
    elif "again" in events:
        run.state, run.why = "REQUEUED", f"{_ended_by(events['again'], run)}; starts again"
    elif "final" in events:
        run.state, run.why = "FAILED", _ended_by(events["final"], run)
    elif "stopped" in events:
        signal = events["stopped"].get("signal", "a signal")
        run.state, run.why = "STOPPED", f"told to stop by {signal}" + _goes_on(run)
    elif process := _own_process(run, began):
        alive = _lives(process, run.folder)
        run.state = "RUNNING" if alive else "KILLED"
        run.why = "" if alive else "it left no word: killed, or the machine stopped" + _goes_on(run)
        if not (alive or began):
            run.state, run.why = "FAILED", f"its processes did not start: see {run.log}"
        if not alive:
            run.seconds = None
    elif not run.lines and summary:
        # A run that training.max_steps stopped did what it was asked to do.
        as_asked = summary.get("finished") or summary.get("stopped_by") == MAX_STEPS
        run.state = "COMPLETED" if as_asked else "STOPPED"
        run.why = _left_early(run, summary)
        run.seconds = summary.get("seconds")
    if not run.lines and (run.folder / RESULTS).is_file():
        run.state = "COMPLETED"


def is_rehearsal(run: Run) -> bool:
    """Whether the run's job ran under submitit's local executor, not in Slurm."""
    said = [line.get("executor") for line in run.lines if line["event"] == "submitted"]
    return said[-1:] == ["local"]


def _own_process(run: Run, began: dict[str, Any] | None) -> dict[str, Any] | None:
    """The line that names the process to look for; None for a job that Slurm looks after."""
    if began and not began["job"]:
        return began
    submitted = [line for line in run.lines if line["event"] == "submitted" and "since" in line]
    return (began or next(reversed(submitted), None)) if is_rehearsal(run) else None


def _goes_on(run: Run) -> str:
    return "" if run.job else "; the same command goes on"


def _left_early(run: Run, summary: Mapping[str, Any]) -> str:
    if run.step is None or run.total is None or run.step >= run.total:
        return ""
    told = summary.get("stopped_by") if summary.get("step") == run.step else ""
    return f"{f'stopped by {told} ' if told else ''}at step {run.step} of {run.total}"


def _whose(line: Mapping[str, Any]) -> str:
    rank = line.get("rank", 0)
    return f"{f'rank {rank}: ' if rank else ''}{line.get('error', '')}"


def _ended_by(line: Mapping[str, Any], run: Run) -> str:
    """Describe how a job ended, from the batch script's line."""
    kind, status, step = line.get("kind"), int(line.get("status", 0)), line.get("step", "none")
    where = f"at checkpoint {step}" if step != "none" else "before a checkpoint"
    if kind == "stopped":
        return f"told to stop (pre-emption or time limit), saved {where}"
    if kind == "interrupted":
        return f"interrupted, saved {where}"
    if kind == "unstarted":
        return f"the processes did not start (status {status}): see {run.log or 'the log'}"
    if hang := _hang(run.folder) if status == HUNG else "":
        return hang
    peers = [x for x in run.attempt if x["event"] == "lost_peer"]
    lost = f"a process was lost ({_whose(peers[0])})" if peers else f"it ended with {status}"
    by = {
        137: "a process was killed (out of memory?)",
        # srun reports the highest status of all ranks: here of one that srun itself ended.
        143: "a process was killed or ended",
        134: "a process aborted",
        HUNG: "hung",
    }.get(status, lost)
    return f"{by}, {where}"


def _hang(folder: Path) -> str:
    lines = sorted(folder.glob("hangs/*/line.txt"), key=lambda path: path.stat().st_mtime)
    return lines[-1].read_text().strip() if lines else ""


def _lives(began: Mapping[str, Any], folder: Path) -> bool:
    if began.get("host") == socket.gethostname():
        return bool(began.get("since")) and started(int(began["pid"])) == began["since"]
    lock = folder / LOCK
    return lock.exists() and time.time() - lock.stat().st_mtime < STALE_S


def _last_metrics(folder: Path) -> tuple[int | None, dict[str, float]]:
    """The last step, and the last values of the losses and of the probes' figures."""
    step: int | None = None
    found: dict[str, float] = {}
    for line in _tail(folder / METRICS):
        step = int(line.get("step") or step or 0)
        found |= {
            key: float(value)
            for key, value in line.items()
            if (key == "loss" or "/" in key and not key.startswith("grad_norm/"))
            and isinstance(value, int | float)
        }
    for probe, part in _json(folder / RESULTS).items():
        figures = part.get("figures", {}) if isinstance(part, dict) else {}
        found |= {f"{probe}/{k}": v for k, v in figures.items() if isinstance(v, int | float)}
        if all(isinstance(own, dict) for own in figures.values()):  # a comparison's, by nets
            for net, own in figures.items():
                found |= {f"{net}/{k}": v for k, v in own.items() if isinstance(v, int | float)}
    return step, found


def _tail(path: Path, size: int = 200_000) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        texts = file.read().decode(errors="replace").splitlines()
    lines = []
    for text in texts:
        with suppress(ValueError):
            line = json.loads(text)
            lines += [line] if isinstance(line, dict) else []
    return lines


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _head_of_config(folder: Path) -> dict[str, str]:
    """The run's name from config.yaml, without parsing YAML, as the list may be long."""
    with suppress(OSError):
        for line in (folder / CONFIG).read_text("utf-8", "replace").splitlines():
            if line.startswith("name: "):
                return {"name": line.removeprefix("name: ").strip("'\" ")}
    return {}
