"""From /proc: whether a process still runs, and since when."""

from pathlib import Path


def stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat behind the name; nothing for a process that has ended."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return []
    return fields if fields[0] not in "ZX" else []


def started(pid: int) -> int:
    """When a process started, in ticks since boot; 0 if it has ended or is a zombie."""
    fields = stat(pid)
    return int(fields[19]) if fields else 0
