"""A hung rank ends the run: every rank leaves its stacks, and one line names the rank behind.

A thread per rank notices that no step has been finished for a while. Ranks finish their steps
together (`utils/health.py` makes them agree on each), so all notice at about the same time, and the
one behind is the one that stands earliest in the step, or does not answer. Where even that thread
cannot run, because C code holds the interpreter, faulthandler's own thread does the same a little
later.
"""

import faulthandler
import json
import linecache
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from utils import distributed
from utils.endings import HUNG

FIRST_STEP = 3.0  # how many times longer the first step may take: it compiles and opens the data


class Watchdog:
    """Watches one rank's loop, inside a `with` block, for `timeout_s` without a finished step.

    `timeout_s` 0 watches nothing. Stacks go to `folder/<step>/rank<r>.txt`, the line to
    `folder/<step>/line.txt` and to the error stream. Every rank then ends with the code `HUNG`.
    `watched` is the file whose lines say how far a rank has come: the loop's.
    """

    def __init__(self, folder: Path, *, timeout_s: float, watched: str) -> None:
        self.folder, self.timeout_s, self.watched = Path(folder), timeout_s, watched
        self.answer_s = min(30.0, timeout_s / 2)
        self.step = 0
        self._limit = timeout_s * FIRST_STEP
        self._since = time.monotonic()
        self._resting = 0
        self._over = threading.Event()
        self._main = threading.get_ident()
        self._thread: threading.Thread | None = None
        self._last_resort: TextIO | None = None

    def __enter__(self) -> "Watchdog":
        self._since, self._main = time.monotonic(), threading.get_ident()
        if self.timeout_s:
            for answer in self.folder.glob("*/rank*.json") if distributed.is_main() else ():
                answer.unlink(missing_ok=True)  # of a hang at the same step before
            self._arm(self._limit + 2 * self.answer_s)  # C code may hold all threads from now on
            self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
            self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
        if self._last_resort is not None:
            self._last_resort.close()
            Path(self._last_resort.name).unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()  # if nothing was to be told

    def finished(self, step: int) -> None:
        """Say that `step` steps are finished."""
        self.step, self._limit, self._since = step, self.timeout_s, time.monotonic()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Do not watch what takes its own time (probes)."""
        self._resting += 1
        try:
            yield
        finally:
            self._resting -= 1
            self._since = time.monotonic()

    def _watch(self) -> None:
        tick = min(self.timeout_s / 4, 5.0)
        while not self._over.wait(tick):
            if self._resting:
                self._since = time.monotonic()
            self._arm(max(self._limit - (time.monotonic() - self._since), 0) + 2 * self.answer_s)
            if time.monotonic() - self._since > self._limit:
                self._report()

    def _arm(self, seconds: float) -> None:
        # It lives in C and asks nobody: this thread may be kept from running by then.
        if self._last_resort is None:
            path = self.folder / f"rank{distributed.rank()}_held.txt"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._last_resort = open(path, "w")  # noqa: SIM115 (open as long as the watch)
            except OSError:
                return
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._last_resort)

    def _report(self) -> None:
        self._arm(4 * self.answer_s)  # the report itself may hang: on the disk, on its reader
        waited = time.monotonic() - self._since
        folder, rank = self.folder / str(self.step), distributed.rank()
        frame = sys._current_frames().get(self._main)
        mine = {
            **_place(frame, self.watched),
            "rank": rank,
            "step": self.step,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"rank{rank}.txt", "w") as file:
                faulthandler.dump_traceback(file)
            temporary = folder / f".rank{rank}.json"
            temporary.write_text(json.dumps(mine))
            temporary.replace(folder / f"rank{rank}.json")
            answers = self._gather(folder)
        except OSError:
            faulthandler.dump_traceback(sys.stderr)  # the disk may be what hangs
            answers = [mine]
        line = blame(answers, distributed.world_size())
        line = f"no step finished for {waited:.0f} s: {line}; stacks of all ranks: {folder}"
        if rank == min(answer["rank"] for answer in answers):
            print(f"error: {line}", file=sys.stderr, flush=True)
            with suppress(OSError):
                (folder / "line.txt").write_text(f"{line}\n")
            time.sleep(self.answer_s / 10)  # a launcher kills all when the first one ends
        else:
            time.sleep(self.answer_s / 5)
        os._exit(HUNG)

    def _gather(self, folder: Path) -> list[dict[str, Any]]:
        # By files: the process group is what may hang.
        found: dict[str, dict[str, Any]] = {}
        end = time.monotonic() + self.answer_s
        while time.monotonic() < end and len(found) < distributed.world_size():
            for path in folder.glob("rank*.json"):
                found[path.name] = json.loads(path.read_text())
            time.sleep(self.answer_s / 50)
        return list(found.values())


def blame(answers: list[dict[str, Any]], world_size: int) -> str:
    """Which rank is behind, in words, from where each stands."""
    silent = sorted(set(range(world_size)) - {answer["rank"] for answer in answers})
    if silent:
        ranks = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent[:8]))}"
        more = f" and {len(silent) - 8} more" if len(silent) > 8 else ""
        return f"{ranks}{more} gave no sign (killed, stopped, or its node is gone)"

    def progress(answer: dict[str, Any]) -> tuple[int, int, int, bool]:
        return answer["step"], answer["micro_batch"], answer["line"], answer["waits"]

    behind = min(answers, key=progress)
    where = f"in step {behind['step'] + 1} at {behind['code']!r}, {behind['innermost']}"
    who = f"rank {behind['rank']} ({behind['host']}, process {behind['pid']})"
    if len(answers) > 1 and all(progress(one) == progress(behind) for one in answers):
        return f"all {world_size} ranks stand {where}: the network or a device may be at fault"
    return f"{who} is behind, {where}"


def _place(frame: FrameType | None, watched: str) -> dict[str, Any]:
    # How far the loop is: the line of `watched` it executes, the micro-batch, and whether it waits
    # for other ranks below that.
    innermost, waits, found = frame, False, None
    while frame is not None:
        file = frame.f_code.co_filename
        waits = waits or "/torch/distributed/" in file.replace(os.sep, "/")
        if file == watched:
            found = frame
            break
        frame = frame.f_back
    if found is None or innermost is None:
        return {"line": 0, "micro_batch": 0, "waits": waits, "code": "?", "innermost": "?"}
    inner = innermost.f_code
    return {
        "line": found.f_lineno,
        "micro_batch": int(found.f_locals.get("micro_batch", 0) or 0),
        "waits": waits,
        "code": linecache.getline(watched, found.f_lineno).strip(),
        "innermost": f"inside {inner.co_qualname} ({inner.co_filename}:{innermost.f_lineno})",
    }
