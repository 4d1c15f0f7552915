"""List our runs: job, state, how far they are, their last figures, and why they ended.

    python -m slurm.jobs [FOLDER ...] [--json] [--last N] [--state STATE]

FOLDER is where run folders lie (runs by default). A run tells of itself in its folder; of a Slurm
job, sacct and squeue are asked too, where they are installed. The newest run stands at the end.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from slurm import runs
from slurm.runs import Run
from utils.command import Parser, as_command
from utils.errors import UserError

_SACCT = "JobID,State,ExitCode,ElapsedRaw,Timelimit,NodeList"
_SQUEUE = ("JobID", "State", "Reason", "Elapsed", "Timelimit", "NodeList")
_SQUEUE_FORMAT = "%i|%T|%r|%M|%l|%N"
_EARLIER = {"NODE_FAIL": "node failure", "PREEMPTED": "pre-emption", "TIMEOUT": "time limit"}
_ONGOING = ("RUNNING", "PENDING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "RESIZING")
_ENDED = ("COMPLETED", "FAILED", "STOPPED", "KILLED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY")
_RARE = ("NODE_FAIL", "PREEMPTED", "DEADLINE", "BOOT_FAIL", "UNKNOWN", runs.UNREADABLE)
_STATES = (*_ONGOING, *_ENDED, *_RARE)


@as_command()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = Parser(prog="python -m slurm.jobs", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")], metavar="FOLDER")
    parser.add_argument("--json", action="store_true", help="everything known, as JSON")
    parser.add_argument("--last", type=int, default=0, metavar="N", help="the newest N runs alone")
    parser.add_argument("--state", default="", help="runs of this state alone, such as FAILED")
    arguments = parser.parse_args(argv)
    _check(arguments.folders, arguments.last, arguments.state.upper())
    found = list_runs(arguments.folders)
    if arguments.state:
        found = [run for run in found if run.state.startswith(arguments.state.upper())]
    found = found[-arguments.last :] if arguments.last > 0 else found
    if arguments.json:
        print(json.dumps([_as_json(run) for run in found], indent=1))
    elif found:
        show(found)
    else:
        which = f" that are {arguments.state.upper()}" if arguments.state else ""
        print(f"no runs{which} in {', '.join(map(str, arguments.folders))}")
    return 0


def _check(folders: Sequence[Path], last: int, state: str) -> None:
    if absent := [str(folder) for folder in folders if not folder.is_dir()]:
        raise UserError(f"there is no folder {', '.join(absent)}")
    if last < 0:
        raise UserError(f"--last takes the number of runs to show, 0 for all, not {last}")
    if not any(name.startswith(state) for name in _STATES):
        raise UserError(f"--state: there is no {state}; a run is {', '.join(_STATES)}")


def list_runs(places: list[Path]) -> list[Run]:
    """The runs below these folders, with what Slurm knows of their jobs."""
    found = runs.find(places)
    known = ask_slurm([run.job for run in found if _by_slurm(run)])
    for run in found:
        if run.job in known and _by_slurm(run):
            judge(run, known[run.job])
        elif run.state == "UNKNOWN" and run.job:
            asked = "it was a rehearsal" if runs.is_rehearsal(run) else "ask sacct on its cluster"
            run.why = f"no word of job {run.job} here: {asked}"
    return found


def judge(run: Run, facts: dict[str, str]) -> None:
    """Set a run's state and reason from Slurm's facts on its job and the run's own record."""
    state, said = facts["State"].split()[0].rstrip("+"), run.why
    run.seconds = float(facts.get("ElapsedRaw") or 0)
    earlier = f" (after {facts['Earlier']})" if facts.get("Earlier") else ""
    restarts = f"{run.restarts} restart{'s' * (run.restarts > 1)}{earlier}" if run.restarts else ""
    if state in _ONGOING:
        # While a job waits to restart, show what ended the attempt before.
        before = said if run.state in ("REQUEUED", "FAILED", "STOPPED") else ""
        run.state = "RUNNING" if state == "COMPLETING" and run.state == "RUNNING" else state
        waits = f"waits: {facts['Reason']}" if state == "PENDING" and facts.get("Reason") else ""
        run.why = "; ".join(part for part in (waits, before if waits else "", restarts) if part)
        return
    log = f": see {run.log}" if run.log else ""
    reasons = {
        "COMPLETED": said if run.state == "COMPLETED" else "",
        "TIMEOUT": f"met the time limit ({facts.get('Timelimit', '')}) before it could save",
        "OUT_OF_MEMORY": "a node ran out of the memory asked for (cluster.mem_gb)",
        "NODE_FAIL": f"a node failed ({facts.get('NodeList', '')})",
        "PREEMPTED": "pre-empted, and not started again",
        "DEADLINE": "its deadline passed",
        "BOOT_FAIL": "a node did not start",
        "CANCELLED": _cancelled(run, facts),
    }
    code = f"exit code {facts['ExitCode']}" if facts.get("ExitCode") else "it failed"
    fallback = said or f"{code}{log}"
    run.state = state
    run.why = "; ".join(part for part in (reasons.get(state, fallback), restarts) if part)


def ask_slurm(jobs: Sequence[str]) -> dict[str, dict[str, str]]:
    """What sacct and squeue know of jobs, by id; empty if no Slurm answers."""
    wanted = sorted({job.split("_")[0] for job in jobs if job.split("_")[0].isdecimal()})
    if not wanted:
        return {}
    listed = ",".join(wanted)
    words = ["sacct", "--allocations", "--duplicates", "--noheader", "--parsable2"]
    found: dict[str, dict[str, str]] = {}
    for line in _ask([*words, f"--format={_SACCT}", f"--jobs={listed}"]):
        facts = dict(zip(_SACCT.split(","), line.split("|"), strict=False))
        job = facts.get("JobID", "")
        if before := found.get(job):  # an earlier attempt; our own requeues are not mentioned
            known = [before.get("Earlier", ""), _EARLIER.get(before["State"].split()[0], "")]
            facts["Earlier"] = ", ".join(dict.fromkeys(part for part in known if part))
        found[job] = facts
    # squeue knows more about waiting jobs; of every job it knows sooner what became of it, as the
    # accounting is told with some delay (or not kept at all). %i is the id as users write it.
    queue = ["squeue", "--noheader", "--array", "--states=all", f"--format={_SQUEUE_FORMAT}"]
    for line in _ask([*queue, f"--jobs={listed}"]):
        facts = dict(zip(_SQUEUE, line.split("|"), strict=False))
        job, elapsed = facts.pop("JobID"), facts.pop("Elapsed", "")
        facts["ElapsedRaw"] = str(_seconds(elapsed))
        before = found.get(job, {})
        if facts.get("State") in _ONGOING:
            now = {key: facts.get(key, "") for key in ("State", "Reason")}
            found[job] = {**facts, **before, **now}
        elif _is_ongoing(before.get("State", "PENDING")):
            found[job] = {**facts, "Earlier": before.get("Earlier", "")}
    for job, facts in list(found.items()):  # an array listed as a whole while it waits: 12_[0-3%2]
        base, _, rest = job.partition("_[")
        if rest:
            for run in jobs:
                array, _, task = run.partition("_")
                if array == base and _among(task, rest):
                    found.setdefault(run, facts)
    return found


def _is_ongoing(state: str) -> bool:
    return state.partition(" ")[0].rstrip("+") in _ONGOING


def _seconds(elapsed: str) -> int:
    """The seconds of squeue's [days-][hours:]minutes:seconds; 0 of anything else."""
    days, _, rest = elapsed.rpartition("-")
    parts = [days or "0", *["0", "0", *rest.split(":")][-3:]]
    if not all(part.isdecimal() for part in parts):
        return 0
    return sum(int(part) * size for part, size in zip(parts, (86400, 3600, 60, 1), strict=True))


def _among(task: str, ranges: str) -> bool:
    """Whether a task is one of "0-3,7%2]"; Slurm cuts a long list off with "..."."""
    if "..." in ranges:
        return True
    for part in re.split(r"[%\]]", ranges)[0].split(","):
        low, _, high = part.partition("-")
        if low.isdecimal() and task.isdecimal() and int(low) <= int(task) <= int(high or low):
            return True
    return False


def show(found: Sequence[Run]) -> None:
    """Print runs as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("job", "name", "state", "elapsed", "step"):
        table.add_column(column, no_wrap=column != "name", overflow="fold")
    for column in ("last figures", "why", "run folder"):
        table.add_column(column, overflow="fold")
    for run in found:
        step = "" if run.step is None else f"{run.step}/{run.total or '?'}"
        took = "" if run.seconds is None else str(timedelta(seconds=round(run.seconds)))
        figures = "\n".join(f"{k} {v:.4g}" for k, v in chosen_figures(run).items())
        job = run.job or "-"
        table.add_row(job, run.name, run.state, took, step, figures, run.why, _near(run.folder))
    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=180)
    console.print(table, markup=False)


def chosen_figures(run: Run) -> dict[str, float]:
    """The loss and the first figure of each probe, three at most."""
    chosen: dict[str, float] = {}
    for key, value in run.metrics.items():
        probe = key.split("/")[0]
        if not any(other.split("/")[0] == probe for other in chosen):
            chosen[key] = value
    return dict(list(chosen.items())[:3])


def _near(folder: Path) -> str:
    """A folder relative to the working directory if it lies below it, else its absolute path."""
    full = folder.absolute()
    return str(full.relative_to(Path.cwd())) if full.is_relative_to(Path.cwd()) else str(full)


def _cancelled(run: Run, facts: dict[str, str]) -> str:
    after = next((line.get("after") for line in run.lines if line.get("after")), "")
    _, _, user = facts["State"].partition(" by ")
    if after and facts.get("ElapsedRaw", "0") == "0" and user in ("", "0"):  # by Slurm itself
        before = after.partition(":")[2]
        return f"did not start: job {before}, which it was to follow, did not succeed"
    by = f" by {_user(user)}" if user else ""
    stopped = any(line["event"] == "stopped" for line in run.lines)
    return f"cancelled{by}{f', saved at checkpoint {run.step}' if stopped else ''}"


def _user(number: str) -> str:
    import pwd

    try:
        return pwd.getpwuid(int(number)).pw_name
    except (ValueError, KeyError):
        return number


def _by_slurm(run: Run) -> bool:
    """Whether the run has a job and it ran in Slurm, not under cluster.executor=local."""
    return bool(run.job) and not runs.is_rehearsal(run)


def _ask(words: list[str]) -> list[str]:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _as_json(run: Run) -> dict[str, Any]:
    return {
        "job": run.job,
        "name": run.name,
        "state": run.state,
        "why": run.why,
        "seconds": run.seconds,
        "step": run.step,
        "total_steps": run.total,
        "restarts": run.restarts,
        "metrics": run.metrics,
        "folder": str(run.folder),
        "log": run.log,
    }


if __name__ == "__main__":
    raise SystemExit(main())
