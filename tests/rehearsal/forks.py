"""Children of this process that start at once, because torch is imported already."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


def say(text: str) -> None:
    """One line, at once."""
    print(text, flush=True)


class Outcome(NamedTuple):
    """What a child said and how it ended: `code` is negative for a signal, None past its time."""

    code: int | None
    stdout: str
    stderr: str
    seconds: float


class Child:
    """`function` in a fork, its output in files below `folder`."""

    def __init__(
        self, function: Callable[[], object], folder: Path, env: dict[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / "stdout.txt", folder / "stderr.txt"]
        self.start = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run(function, self.files, env or {})

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout_s: float) -> Outcome:
        """How it ended; killed when its time is over."""
        code: int | None = None
        end, late = time.monotonic() + timeout_s, False
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = None if late else os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() > end:
                late = True
                self.kill()
            time.sleep(0.002)
        texts = [file.read_text(errors="replace") for file in self.files]
        return Outcome(code, *texts, time.monotonic() - self.start)


def _run(function: Callable[[], object], files: list[Path], env: dict[str, str]) -> None:
    # As a program would: its own streams, one line for what it refuses, the exit code.
    code = 1
    try:
        for number, file in enumerate(files, 1):
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(handle, number)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        os.environ.update(env)
        function()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
