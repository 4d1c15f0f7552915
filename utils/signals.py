"""Signals that end a run in order: finish the step, write a checkpoint, leave."""

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StopSignal:
    """Catches INT, TERM and USR2 inside a `with` block; a second INT interrupts at once.

    `received` is what this process saw; the loop makes the ranks agree before anyone stops.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        """Install the handlers; outside the main thread, where Python forbids it, do nothing."""
        try:
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        except ValueError:
            self._previous = {}
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

    def earlier_handler(self) -> Callable[[int, FrameType | None], Any] | None:
        """Another's handler of the received signal (submitit's requeue), for after the save."""
        handler = self._previous.get(self.received) if self.received else None
        return handler if callable(handler) and handler is not signal.default_int_handler else None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
