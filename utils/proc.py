"""Whether a process still runs, since when, and where its number means the same."""

import os
import socket
from pathlib import Path


def stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat behind the name; nothing for a process that has ended."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return []
    return fields if fields[0] not in "ZX" else []


def started(pid: int) -> int:
    """When a process started, in ticks since boot; 0 if it has ended or is a zombie.

    Without /proc, 1 for one that runs.
    """
    fields = stat(pid)
    return int(fields[19]) if fields else _alive_without_proc(pid)


def machine() -> str:
    """Where process ids mean the same: under one boot and in one namespace (containers)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _alive_without_proc(pid: int) -> int:
    if Path("/proc/self/stat").exists():
        return 0
    try:
        os.kill(int(pid), 0)
    except (OSError, ValueError):
        return 0
    return 1
