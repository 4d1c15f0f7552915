"""Processes and ports of this machine: see whether a process still runs, and stop just that one."""

import ctypes
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.proc import started, stat


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock a folder for a `with` block; UserError if another command holds the lock."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"another command is at work in {folder}") from None
    finally:
        os.close(handle)


def free_ports(count: int) -> Iterator[int]:
    """Consecutive free ports of the loopback, below those that Linux hands out by itself."""
    for first in range(17000, 30000, 10):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return iter(range(first, first + count))
    raise UserError("no free ports between 17000 and 30000")


def listens(port: int) -> bool:
    """Whether a process listens on a port of the loopback."""
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def name_localhost() -> None:
    """Give this process and its children the host name localhost. Needs root.

    Slurm can only listen on the host's address, which it looks up by the host's name.
    """
    new_names = 0x04000000  # CLONE_NEWUTS
    if ctypes.CDLL(None, use_errno=True).unshare(new_names):
        raise OSError(ctypes.get_errno(), "the host name cannot be changed here")
    socket.sethostname("localhost")


def lives(daemon: dict[str, Any]) -> bool:
    """Whether this daemon still runs; another process that reuses its pid does not count."""
    try:
        command = Path(f"/proc/{daemon['pid']}/cmdline").read_bytes().decode().split("\0")[:-1]
    except OSError:
        return False
    return started(daemon["pid"]) == daemon["started"] and command == daemon["command"]


def descendants(pids: set[int]) -> set[int]:
    """All descendants of these processes."""
    places = Path("/proc").glob("[0-9]*")
    stats = {int(place.name): stat(int(place.name)) for place in places}
    parents = {pid: int(fields[1]) for pid, fields in stats.items() if fields}
    found: set[int] = set()
    while more := {pid for pid, parent in parents.items() if parent in pids | found} - found:
        found |= more
    return found


def stop(pid: int, since: int) -> None:
    """Send TERM, then KILL after 15 seconds; never to another process that reuses the pid."""
    for signal, patience in ((15, 15), (9, 5)):
        end = time.monotonic() + patience
        if since and started(pid) == since:
            os.kill(pid, signal)
        while since and started(pid) == since and time.monotonic() < end:
            time.sleep(0.05)
