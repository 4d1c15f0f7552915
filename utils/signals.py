"""Signals that end a run in order: finish the step, write a checkpoint, leave."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self

# By these a process is told to leave: a person (INT), Slurm or an administrator (TERM, and USR1 or
# USR2 ahead of a limit), a closed terminal (HUP). slurm/after.sh knows them by number.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def heeded(numbers: Iterable[signal.Signals] = STOP_SIGNALS) -> list[signal.Signals]:
    """These signals without a HUP that is ignored: `nohup` asks to go on without a terminal."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in numbers if number != signal.SIGHUP or not ignored]


def forget_lost_terminal() -> None:
    """Throw away what is printed from now on, if it went to a terminal that has been closed.

    Writing there fails, and what is to be saved after a HUP must not fall over a message.
    """
    for stream in (1, 2):
        try:
            os.write(stream, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            if nowhere != stream:
                os.close(nowhere)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let a signal that was to be handled end the process at once inside a `with` block.

    For a wait in foreign code: a handler of Python's would not run before the wait is over.
    """
    handled: dict[signal.Signals, Any] = {}
    with suppress(ValueError):  # outside the main thread nothing can be changed
        for number in STOP_SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                signal.signal(number, signal.SIG_DFL)
                handled[number] = handler
    try:
        yield
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)


class Handlers:
    """Hands the signals of `caught` to `_handle` inside a `with` block."""

    caught: tuple[signal.Signals, ...] = ()

    def __init__(self) -> None:
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Install the handlers; outside the main thread, where Python forbids it, do nothing."""
        with suppress(ValueError):
            for number in heeded(self.caught):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class StopSignal(Handlers):
    """Catches `STOP_SIGNALS` inside a `with` block; a second INT interrupts at once.

    A later signal does not replace an INT, which means that a person ends the run.
    `received` is what this process saw; the loop makes the ranks agree before anyone stops.
    """

    caught = STOP_SIGNALS

    def __init__(self) -> None:
        super().__init__()
        self.received: signal.Signals | None = None

    def earlier_handler(self) -> Callable[[int, FrameType | None], Any] | None:
        """Another's handler of the received signal (submitit's, slurm/job.py's), for after."""
        handler = self._previous.get(self.received) if self.received else None
        return handler if callable(handler) and handler is not signal.default_int_handler else None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            forget_lost_terminal()
        if self.received is not signal.SIGINT:
            self.received = signal.Signals(number)
