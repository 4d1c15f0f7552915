"""Run a command in its own process group: show and log its output, and stop the whole group."""

import codecs
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NamedTuple

from utils.signals import Handlers

LIMIT, INTERRUPT = "limit", "interrupt"
# The signals that end a child, with the seconds to wait before the next one.
GRACES = ((signal.SIGINT, 10.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))
TICK_S = 0.2


class Interrupts(Handlers):
    """Counts INT, TERM and HUP inside a `with` block, instead of their usual effect."""

    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


class Ended(NamedTuple):
    """How a command ended; the code is negative if a signal ended it."""

    code: int
    cause: str | None  # LIMIT or INTERRUPT, if it was stopped
    seconds: float


def run(
    command: Sequence[str],
    log: Path,
    *,
    limit_s: float,
    interrupts: Interrupts,
    graces: Sequence[tuple[int, float]] = GRACES,
) -> Ended:
    """Run a command to its end or for `limit_s` seconds; its output is printed and goes to `log`.

    At the limit or an interrupt its whole group gets the signals of `graces` in turn; a further
    interrupt sends the next one at once. Processes left in its group at the end are killed.
    """
    start = time.monotonic()
    cause, due, seen = None, start + limit_s, interrupts.count
    waiting = list(graces)
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            process_group=0,
        )
        with _Output(process, file) as output:
            while process.poll() is None:
                output.pass_on(TICK_S)
                hurried, seen = interrupts.count > seen, interrupts.count
                if waiting and (hurried or time.monotonic() >= due):
                    cause = cause or (INTERRUPT if hurried else LIMIT)
                    number, grace = waiting.pop(0)
                    _signal(process.pid, number)
                    due = time.monotonic() + grace
    return Ended(process.returncode, cause, time.monotonic() - start)


class _Output:
    """Passes the output of a process on as it comes; at the end it kills the process group."""

    def __init__(self, process: subprocess.Popen[bytes], file: BinaryIO) -> None:
        assert process.stdout is not None
        self.process, self.pipe, self.file = process, process.stdout, file
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.open = True

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *error: Any) -> None:
        _signal(self.process.pid, signal.SIGKILL)  # the rest of the group, also after an exception
        self.process.wait()
        with self.pipe:
            while not any(error) and self.pass_on(0.0):
                pass

    def pass_on(self, seconds: float) -> bool:
        """Wait at most `seconds` for output and pass it on; returns whether there was some."""
        if not self.open:  # it closed its output but still runs
            time.sleep(seconds)
            return False
        if not select.select([self.pipe], [], [], seconds)[0]:
            return False
        data = os.read(self.pipe.fileno(), 1 << 16)
        self.open = bool(data)
        self.file.write(data)
        self.file.flush()
        with suppress(OSError):  # the terminal is gone; the log is not
            sys.stdout.write(self.decoder.decode(data, final=not data))
            sys.stdout.flush()
        return self.open


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
