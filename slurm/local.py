"""Several processes on this machine, and several runs one after another."""

import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from slurm.job import Function, Job, run_rank
from slurm.record import STOPPED, Ended
from utils.errors import UserError
from utils.signals import forget_lost_terminal, heeded


def run_processes(function: Function, config: dict[str, Any]) -> None:
    """Run one process per GPU; rank 0 prints here, and all are stopped if one fails."""
    from torch import multiprocessing

    count = config["launcher"]["gpus_per_node"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // count)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # the processes share the cores
    folder = str(Path(config["output_dir"]) / "logs")
    arguments = (Job(function, config), count, port, folder)
    processes: list[Any] = []
    with _passed_on(processes) as received:
        context = multiprocessing.start_processes(run_rank, arguments, count, join=False)
        processes += context.processes
        for number in received:  # signals that came while the processes were starting
            _pass_on(number, processes)
        _wait(context, folder, received)
    if signal.SIGINT in received:
        raise KeyboardInterrupt


def _wait(context: Any, folder: str, received: list[int]) -> None:
    """Wait for all processes; raise the error or exit that fits a failed one or a signal."""
    from torch import multiprocessing

    try:
        while not context.join(grace_period=5):
            pass
    except multiprocessing.ProcessExitedException as error:
        code = error.exit_code if error.exit_code >= 0 else 128 - error.exit_code
        if signal.SIGINT in received or code == 128 + signal.SIGINT:
            raise KeyboardInterrupt from None
        # A process without signal handlers yet was ended by the signal passed on to it.
        if error.exit_code in STOPPED or code - 128 in received:
            print(f"stopped by {STOPPED[code].name}", file=sys.stderr)
            raise SystemExit(code) from None
        raise _said(error, folder) from None
    except multiprocessing.ProcessRaisedException as error:
        if line := re.search(r"^(?:\w+\.)*UserError: (.+)", str(error), re.MULTILINE):
            raise UserError(line[1]) from None
        print(error, file=sys.stderr)
        raise _said(error, folder) from None


def _said(error: Any, folder: str) -> Ended:
    where = f"; its output: {folder}/rank{error.error_index}.log" if error.error_index else ""
    what = str(error).strip().splitlines()[-1]
    line = f"rank {error.error_index} failed: {what}{where}"
    print(f"error: {line}", file=sys.stderr)
    return Ended(max(1, getattr(error, "exit_code", 1)), line)


def run_apart(function: Callable[..., Any], *arguments: Any) -> int:
    """Call the function in its own process, so that a crash stays there; returns the exit code.

    Signals that would end this process are passed on, so that the other one can exit in order; then
    KeyboardInterrupt, or SystemExit with 128 plus the signal, is raised.
    """
    import multiprocessing

    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    with _passed_on([process]) as received:
        process.start()
        for number in received:  # signals that came while it was starting
            _pass_on(number, [process])
        process.join()
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    if received:
        raise SystemExit(128 + received[0])
    code = process.exitcode or 0
    return code if code >= 0 else 128 - code


@contextmanager
def _passed_on(processes: Sequence[Any]) -> Iterator[list[int]]:
    """Pass signals on to the processes and collect them; a second Control-C interrupts at once."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            forget_lost_terminal()
        received.append(number)
        _pass_on(number, processes)

    earlier = {number: signal.signal(number, handle) for number in heeded()}
    try:
        yield received
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _pass_on(number: int, processes: Sequence[Any]) -> None:
    """Send a signal to the processes that still run, SIGINT as SIGTERM.

    A Control-C in the terminal has already reached them, and a second SIGINT would interrupt them
    at once; a SIGINT from `kill` has reached this process alone.
    """
    number = signal.SIGTERM if number == signal.SIGINT else number
    for process in processes:
        if process.pid and process.exitcode is None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)
