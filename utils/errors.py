"""The error of a user's mistake, and how a command ends with it."""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn


class UserError(ValueError):
    """A mistake in what the user gave: shown as one line, without a traceback."""


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
