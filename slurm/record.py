"""The record of a run's launches: `launches.jsonl` in its folder, one line per event.

    event      written by                  contains
    submitted  the submitting command      job, name, log, code, after (the job it waits for)
    began      rank 0                      job, attempt, processes
    stopped    rank 0                      signal: it exited in order, with a checkpoint
    ended      rank 0                      the function returned
    failed     any rank                    rank, error; refused, if the user's mistake ended it
                                           before the first step
    lost_peer  any rank                    rank, error: it failed because another rank was gone
    again      the job's batch script      status, kind (stopped or killed), step of the checkpoint
    final      the job's batch script      status, why

Lines by ranks also name the process: host, pid and start time. `attempt` counts the restarts of a
Slurm job. Ranks other than 0 write `launches.rank<r>.jsonl`, because nodes that append to one file
of a network file system may lose lines. slurm/after.sh reads and writes the same lines, so the
order of the keys must stay.
"""

import heapq
import json
import math
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from utils.environment import whole_number
from utils.errors import UserError, one_line
from utils.proc import started
from utils.run_files import LAUNCHES, PROGRESS
from utils.signals import STOP_SIGNALS

# Errors of a rank that lost another one; torch's own exceptions are matched by class name.
_LOST = re.compile(
    r"Dist(Backend|Network|Store)Error|connection (closed|reset|refused)|timed out waiting"
    r"|Broken pipe|Socket Timeout|recvValue failed",
    re.IGNORECASE,
)
_TRANSIENT = re.compile(
    r"DataLoader worker .*(killed|exited unexpectedly)|^AcceleratorError(?!.*device-side assert)"
)
STOPPED = {128 + number: number for number in STOP_SIGNALS}


class Ended(SystemExit):
    """Exit with a code after the user was told `why`."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(code)
        self.why = why


def note(folder: Path, event: str, *, job: str = "", attempt: int = 0, **facts: Any) -> None:
    """Append a line; if the folder cannot be written to, the line is lost and the run goes on."""
    rank = _rank()
    line = {"event": event, "job": job, "attempt": attempt, "time": round(time.time(), 3), **facts}
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / (f"launches.rank{rank}.jsonl" if rank else LAUNCHES), "a") as file:
            file.write(json.dumps(line) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """All lines of a run folder in order of time; torn lines are left out.

    Lines of one file keep their order, even if the clocks of their writers disagree.
    """
    files = [_lines(path) for path in sorted(folder.glob("launches*.jsonl"))]
    return [line for _, line in heapq.merge(*files, key=lambda timed: timed[0])]


def _lines(path: Path) -> list[tuple[float, dict[str, Any]]]:
    """The lines of one file, each with the latest time in the file so far."""
    latest, found = 0.0, []
    for text in path.read_text(errors="replace").splitlines():
        with suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("event"), str):
                line = _mended(line)
                latest = max(latest, line["time"])
                found.append((latest, line))
    return found


def _mended(line: dict[str, Any]) -> dict[str, Any]:
    """The line with a valid job, attempt and time; "", 0 and 0.0 where it has none."""
    job, number, when = (line.get(key) for key in ("job", "attempt", "time"))
    return {
        **line,
        "job": job if isinstance(job, str) else "",
        "attempt": number if isinstance(number, int) else 0,
        "time": float(when) if isinstance(when, int | float) and math.isfinite(when) else 0.0,
    }


@contextmanager
def attempt(folder: Path, *, job: str = "", **facts: Any) -> Iterator[None]:
    """Record how the body of a `with` block begins and ends."""
    who: dict[str, Any] = {
        "job": job,
        "attempt": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": started(os.getpid()),
    }
    rank = _rank()
    is_main, earlier = rank == 0, _progress(folder)
    if is_main:
        note(folder, "began", **who, **facts)
    try:
        yield
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(bool(left.code))
        if code in STOPPED:
            if not is_main:  # a nonzero code would make srun kill rank 0, which is not done yet
                raise SystemExit(0) from None
            note(folder, "stopped", **who, signal=STOPPED[code].name)
        elif code:
            error = getattr(left, "why", f"it left with code {code}")
            note(folder, "failed", **who, rank=rank, error=error)
        elif is_main:
            note(folder, "ended", **who)
        raise
    except KeyboardInterrupt:
        if is_main:
            note(folder, "stopped", **who, signal="SIGINT")
        raise
    except BaseException as error:
        event = "lost_peer" if is_lost(error) else "failed"
        mistaken = event == "failed" and isinstance(error, UserError)
        # A training writes progress.json at its first step.
        refused = {"refused": True} if mistaken and _progress(folder) == earlier else {}
        told: dict[str, Any] = {"rank": rank, "error": in_one_line(error), **refused}
        note(folder, event, **who, **told)
        raise
    if is_main:
        note(folder, "ended", **who)


def _rank() -> int:
    return whole_number("RANK", 0)


def _progress(folder: Path) -> int:
    """Modification time of progress.json in nanoseconds; 0 if there is none."""
    with suppress(OSError):
        return (folder / PROGRESS).stat().st_mtime_ns
    return 0


def in_one_line(error: BaseException) -> str:
    """An exception's class and message in one line; the message alone for a UserError."""
    name = type(error).__name__
    words = one_line(error)[:500]
    return words if name == "UserError" else f"{name}: {words}"


def is_lost(error: BaseException) -> bool:
    """Whether an error is worth a restart: a peer or a data worker died, or the GPU failed."""
    what = in_one_line(error)
    lost = not isinstance(error, UserError) and _LOST.search(what)
    return bool(lost or _TRANSIENT.search(what))
