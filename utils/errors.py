"""The error of a user's mistake."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in what the user gave: shown as one line, without a traceback."""


@contextmanager
def long_paths_told() -> Iterator[None]:
    """A path longer than a file system takes is a user's mistake, whoever stumbles over it."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        name = str(error.filename)
        raise UserError(f"a path of {len(name)} characters is too long: {name[:60]}...") from error
