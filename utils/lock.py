"""One run per folder: a lock file that says who holds it, and that its holder is alive.

The file appears by a hard link, which is atomic on NFS too, and its holder touches it every few
seconds. Ages are differences between two time stamps of the file server, so no clock of a node
counts. A lock is taken over at once from a process of this machine that has ended and from an
earlier start of the same Slurm job, and from others once it has not been touched for `STALE_S`.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.endings import LOST
from utils.errors import UserError
from utils.folders import make_folder, refused
from utils.proc import machine, started
from utils.run_files import LOCK

BEAT_S = 10.0
STALE_S = 120.0


class FolderLock:
    """Holds `folder` from `acquire` to `release`; one process of a run does this.

    A holder that was frozen so long that another took over ends itself with the exit code `LOST`.
    """

    def __init__(self, folder: Path, *, beat_s: float = BEAT_S, stale_s: float = STALE_S) -> None:
        self.path = Path(folder) / LOCK
        self.beat_s, self.stale_s = beat_s, stale_s
        self.owner = describe_process()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock; raises UserError with one line about who holds it.

        Waits for a holder that has missed a beat until it stirs or counts as dead.
        """
        make_folder(self.path.parent)
        mine = self.path.with_name(f"{LOCK}.{self.owner['token']}")
        try:
            self._write(mine)
            while not self._link(mine):
                holder, age = self._holder(mine)
                if holder is None:
                    continue  # gone since
                if _has_ended(holder, self.owner) or age > self.stale_s:
                    self._take_over(mine, holder)
                elif age > 2.5 * self.beat_s:
                    time.sleep(self.beat_s / 4)
                else:
                    raise UserError(_in_use(self.path.parent, holder, age))
        finally:
            mine.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._beat, daemon=True, name="folder lock")
        self._thread.start()

    def release(self) -> None:
        """Give the folder free."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if (_read(self.path) or {}).get("token") == self.owner["token"]:
                self.path.unlink(missing_ok=True)

    def _write(self, path: Path) -> None:
        try:
            with open(path, "w") as file:
                json.dump(self.owner, file)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise refused(self.path.parent, error) from None

    def _link(self, mine: Path) -> bool:
        try:
            os.link(mine, self.path)
        except FileExistsError:
            # An answer lost on the way makes NFS say so of our own success.
            return mine.stat().st_nlink == 2
        except OSError:  # a file system without hard links
            try:
                with open(self.path, "x") as file:
                    json.dump(self.owner, file)
            except FileExistsError:
                return False
        return True

    def _holder(self, mine: Path) -> tuple[dict[str, Any] | None, float]:
        os.utime(mine)
        holder = _read(self.path)
        try:
            return holder, mine.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return None, 0.0

    def _take_over(self, mine: Path, holder: Mapping[str, Any]) -> None:
        # Two may find the same lock stale: a folder, made atomically, lets one of them act.
        guard = self.path.with_name(f"{LOCK}.taking")
        try:
            guard.mkdir()
        except FileExistsError:
            with suppress(FileNotFoundError):  # it is gone since
                if mine.stat().st_mtime - guard.stat().st_mtime > self.stale_s:
                    guard.rmdir()  # of one that was killed in the act
            time.sleep(self.beat_s / 20)
            return
        try:
            if (_read(self.path) or {}).get("token") == holder.get("token"):
                self.path.unlink(missing_ok=True)
        finally:
            guard.rmdir()

    def _beat(self) -> None:
        while not self._over.wait(self.beat_s):
            try:
                found = _read(self.path)
                if found is None or found.get("token") == self.owner["token"]:
                    os.utime(self.path)
                    continue
            except OSError:
                continue  # the file server is away: whoever looks at the lock has to wait as well
            print(
                f"error: {_in_use(self.path.parent, found, 0)}, which took it over from this one "
                f"({_name(self.owner)}) after {self.stale_s:.0f} s without a sign of life",
                file=sys.stderr,
                flush=True,
            )
            os._exit(LOST)


def describe_process() -> dict[str, Any]:
    """Facts that identify this process among all, on this and other machines."""
    return {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "machine": machine(),
        "pid": os.getpid(),
        "started": started(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _has_ended(holder: Mapping[str, Any], me: Mapping[str, Any]) -> bool:
    if holder.get("machine") == me["machine"]:
        return started(holder.get("pid", 0)) != holder.get("started")
    same_job = me["job"] and holder.get("job") == me["job"]
    return bool(same_job) and holder.get("restart") != me["restart"]


def _in_use(folder: Path, holder: Mapping[str, Any], age: float) -> str:
    sign = f", last sign of life {max(age, 0):.0f} s ago" if age else ""
    return f"{folder} is in use by {_name(holder)} since {holder.get('since', '?')}{sign}"


def _name(holder: Mapping[str, Any]) -> str:
    job = f"job {holder['job']}, " if holder.get("job") else ""
    return f"{job}process {holder.get('pid', '?')} on {holder.get('host', '?')}"


def _read(path: Path) -> dict[str, Any] | None:
    # None: there is none. A lock that cannot be read is somebody's whom we do not know.
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
