"""The error of a user's mistake, and how a command ends with it."""

import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk


class UserError(ValueError):
    """A mistake in what the user gave: shown as one line, without a traceback."""


def one_line(error: object) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())


@contextmanager
def as_user_error(prefix: str = "") -> Iterator[None]:
    """UserError, in one line, for a ValueError of code that knows no UserError (`vit`, `octic`)."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(prefix + one_line(error)) from None


def fail(error: object, code: int = 2) -> NoReturn:
    """Print one line and leave; of several processes under torchrun the first of a node prints."""
    line = " ".join(str(error).splitlines())
    told = _tell_torchrun(line)
    if not told or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {line}", file=sys.stderr)
    raise SystemExit(code)


def _tell_torchrun(line: str) -> bool:
    """Put a line where torchrun looks for what its report, the last that is printed, is to say."""
    if place := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(place).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))
            return True
    return False
