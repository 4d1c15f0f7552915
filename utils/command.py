"""How commands read their words, and how all of them end."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from utils.console import output_taken
from utils.errors import UserError, fail, one_line
from utils.mistakes import mistakes_told

SHORT = 100  # characters of a usage that is told with a mistake


class Parser(argparse.ArgumentParser):
    """A parser whose `error` raises UserError, with the usage where that is short."""

    def error(self, message: str) -> NoReturn:
        """Raise a mistake in the words as UserError."""
        usage = one_line(self.format_usage())
        raise UserError(f"{message}; {usage}" if len(usage) <= SHORT else message)


@contextmanager
def as_command() -> Iterator[None]:
    """The end of a command whose output is its work: as `told_in_one_line`, and `output_taken`."""
    # A full disk that names no file is the output's, as our own writers name theirs.
    with told_in_one_line(), output_taken():
        yield


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """One line and exit code 2 for a mistake of the user (`mistakes_told`), 130 for an interrupt.

    Every other error propagates, so that the exit code shows it.
    """
    try:
        with mistakes_told():
            yield
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
