"""Several processes on this machine, and several runs one after another."""

import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from slurm.job import Function, Job, run_rank
from slurm.record import Ended
from utils.errors import UserError


def run_processes(function: Function, config: dict[str, Any]) -> None:
    """One process per GPU: the first one's output here, all stopped if one fails."""
    from torch import multiprocessing

    count = config["launcher"]["gpus_per_node"]
    if config["launcher"]["nodes"] > 1:
        raise UserError("launcher=local runs on this machine: launcher.nodes must be 1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // count)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # the processes share the cores
    folder = str(Path(config["output_dir"]) / "logs")
    arguments = (Job(function, config), count, port, folder)
    context = multiprocessing.start_processes(run_rank, arguments, count, join=False)
    interrupted = False
    while True:
        try:
            if context.join(grace_period=5):
                break
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True  # the processes got the signal too: let them save and leave
        except multiprocessing.ProcessExitedException as error:
            if interrupted or error.exit_code == 130:
                raise KeyboardInterrupt from None
            raise _said(error, folder) from None
        except multiprocessing.ProcessRaisedException as error:
            if line := re.search(r"^(?:\w+\.)*UserError: (.+)", str(error), re.MULTILINE):
                raise UserError(line[1]) from None
            print(error, file=sys.stderr)
            raise _said(error, folder) from None
    if interrupted:
        raise KeyboardInterrupt


def _said(error: Any, folder: str) -> Ended:
    where = f"; its output: {folder}/rank{error.error_index}.log" if error.error_index else ""
    what = str(error).strip().splitlines()[-1]
    line = f"rank {error.error_index} failed: {what}{where}"
    print(f"error: {line}", file=sys.stderr)
    return Ended(max(1, getattr(error, "exit_code", 1)), line)


def run_apart(function: Callable[..., Any], *arguments: Any) -> int:
    """Call it in a process of its own, which cannot take this one down; returns its exit code.

    Signals that would end this process are for that one to leave in order; raises
    KeyboardInterrupt, or SystemExit with 128 plus the signal, once it has.
    """
    import multiprocessing

    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    with _passed_on(process) as received:
        process.start()
        process.join()
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    if received:
        raise SystemExit(128 + received[0])
    code = process.exitcode or 0
    return code if code >= 0 else 128 - code


@contextmanager
def _passed_on(process: Any) -> Iterator[list[int]]:
    """Pass signals on to a process; a Control-C of the terminal has reached it already."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if process.pid and number != signal.SIGINT:
            os.kill(process.pid, number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    earlier = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
