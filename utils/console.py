"""Where lines for people go; a training does not end because nobody reads them any more."""

import os
import sys
from contextlib import suppress
from typing import IO, Any

from rich.console import Console


class Lines(Console):
    """A console that falls silent once its output is closed (`... | head`); rich ends the program.

    From then on standard output leads nowhere, and so does standard error if it was the same pipe:
    later lines, whoever prints them, fail no more.
    """

    def on_broken_pipe(self) -> None:
        """What rich calls when its output takes no more."""
        self.quiet = True
        with suppress(OSError, ValueError):  # a stream without a file has no pipe either
            lost = os.fstat(self.file.fileno())
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in (sys.stdout, sys.stderr):
                if _leads_to(stream, lost):
                    os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _leads_to(stream: IO[Any], place: os.stat_result) -> bool:
    with suppress(OSError, ValueError):
        return os.path.samestat(os.fstat(stream.fileno()), place)
    return False
