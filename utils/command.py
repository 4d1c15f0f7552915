"""How commands read their words, and how all of them end."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

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


class WordParser:
    """A command line `WORD [flags]`, where each word has flags and defaults of its own."""

    def __init__(self, about: str) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        self._parser = Parser(description=about, formatter_class=raw)
        self._words = self._parser.add_subparsers(dest="what", required=True)

    def add_word(self, name: str, about: str) -> Callable[..., Any]:
        """Add a word; returns the `add_argument` of its flags."""
        return self._words.add_parser(name, help=about, description=about).add_argument

    def parse_args(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """The flags of the word, which is `what`; UserError for those that it does not read."""
        # What `--help` without a word ends with; that of a word explains them.
        usages = [parser.format_usage() for parser in self._words.choices.values()]
        self._parser.epilog = "".join(usages).replace("usage: ", "")
        found, rest = self._parser.parse_known_args(argv)
        for flag in (word.partition("=")[0] for word in rest if word.startswith("--")):
            readers = sorted(name for name, flags in self._flags().items() if flag in flags)
            if readers:
                told = f"{flag} is for {' and '.join(readers)}"
                raise UserError(f"{told}; {found.what} does not read it")
        if rest:
            self._words.choices[found.what].error(f"unrecognized arguments: {' '.join(rest)}")
        return found

    def _flags(self) -> dict[str, set[str]]:
        parsers = self._words.choices.items()
        return {name: set(parser._option_string_actions) for name, parser in parsers}


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
