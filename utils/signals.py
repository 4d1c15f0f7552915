"""Signals that end a run in order: finish the step, write a checkpoint, leave."""

import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self


class Handlers:
    """Hands the signals of `caught` to `_handle` inside a `with` block."""

    caught: tuple[signal.Signals, ...] = ()

    def __init__(self) -> None:
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Install the handlers; outside the main thread, where Python forbids it, do nothing."""
        with suppress(ValueError):
            for number in self.caught:
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
    """Catches INT, TERM and USR2 inside a `with` block; a second INT interrupts at once.

    `received` is what this process saw; the loop makes the ranks agree before anyone stops.
    """

    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)

    def __init__(self) -> None:
        super().__init__()
        self.received: signal.Signals | None = None

    def earlier_handler(self) -> Callable[[int, FrameType | None], Any] | None:
        """Another's handler of the received signal (submitit's requeue), for after the save."""
        handler = self._previous.get(self.received) if self.received else None
        return handler if callable(handler) and handler is not signal.default_int_handler else None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
