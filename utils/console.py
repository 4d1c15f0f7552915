"""Output that is lost (closed, or on a full disk): it ends no work, or a command in order."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from rich.console import Console

from utils.errors import FULL, fail


class Lines(Console):
    """A console that falls silent once its output takes no more; rich ends the program.

    That is a pipe whose reader has gone (`... | head`), or a log file on a full disk. From then on
    standard output leads nowhere, and so does standard error if it was the same: later lines,
    whoever prints them, fail no more.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does; what cannot be written is lost."""
        with may_be_lost(self.on_broken_pipe):
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """What rich calls when its output takes no more."""
        self.quiet = True
        _lead_nowhere(self.file)


@contextmanager
def may_be_lost(silence: Callable[[], None] | None = None) -> Iterator[None]:
    """What is printed inside may fail: what it told is not worth the work of the command."""
    try:
        yield
    except OSError as error:
        if silence is None:
            _lead_nowhere(sys.stdout)
        else:
            silence()
        if not isinstance(error, BrokenPipeError):  # the reader's own doing
            with suppress(OSError):  # the same disk
                print(f"standard output takes no more: {error.strerror}", file=sys.stderr)


def say(line: str) -> None:
    """Print one line at once; on a full disk, or to a reader that has gone, it is lost."""
    with may_be_lost():
        print(line, flush=True)


@contextmanager
def output_taken() -> Iterator[None]:
    """One line and exit status 1 where standard output does not take what a command prints.

    For what is printed for its own sake (`--check`, `--help`, tables); nothing is said to a reader
    that has gone.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.filename is not None or error.errno not in (*FULL, errno.EPIPE):
            raise
        _lead_nowhere(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise SystemExit(1) from None
        fail(f"standard output takes no more: {error.strerror}", code=1)


def _lead_nowhere(file: IO[str]) -> None:
    with suppress(OSError, ValueError):  # a stream without a file has no pipe either
        lost = os.fstat(file.fileno())
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            if _leads_to(stream, lost):
                os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def open_closed_streams() -> None:
    """Let a standard stream that the process was started without (`>&-`) lead nowhere.

    Python has None there, and the next file that is opened would take its number and get what C
    libraries print.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as it runs


def _leads_to(stream: IO[Any], place: os.stat_result) -> bool:
    with suppress(OSError, ValueError):
        return os.path.samestat(os.fstat(stream.fileno()), place)
    return False
