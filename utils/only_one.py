"""One process at a time, where several may start the same work: the others wait, and say so."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from utils.errors import UserError

TOLD_AFTER_S = 10.0
GIVEN_UP_AFTER_S = 4 * 3600.0  # a download over a slow line may take hours


@contextmanager
def only_one(lock: str | Path) -> Iterator[None]:
    """Hold the lock file, which stays, inside a `with` block; its folder must be there.

    A wait is told of, one that does not end is a UserError. OSError if the file cannot be locked.
    """
    held = FileLock(lock)
    try:
        try:
            held.acquire(timeout=TOLD_AFTER_S)
        except Timeout:
            if os.environ.get("LOCAL_RANK", "0") == "0":  # one line from each node is enough
                print(f"waiting for another process that holds {lock}", file=sys.stderr, flush=True)
            held.acquire(timeout=GIVEN_UP_AFTER_S)
    except Timeout:
        raise UserError(
            f"another process has held {lock} for {GIVEN_UP_AFTER_S / 3600:.0f} hours: end it, or "
            "remove that file if there is none any more, and start again"
        ) from None
    except NotImplementedError as error:  # a file system without locks
        raise OSError(errno.ENOLCK, str(error), str(lock)) from None
    try:
        yield
    finally:
        held.release()
