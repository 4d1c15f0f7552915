"""What a user can mend is said in one line, also where it shows only in the midst of the work."""

import errno
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from utils.build import place_of, raised_by_us
from utils.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
FULL = (errno.ENOSPC, errno.EDQUOT)


def mistakes_in_one_line(function: Callable[P, R]) -> Callable[P, R]:
    """Turn a ValueError of ours, and a full disk, into a UserError; for what a command starts."""

    @wraps(function)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            if isinstance(error, UserError) or not raised_by_us(error):
                raise
            raise UserError(" ".join(str(error).split()) + place_of(error)) from error
        except OSError as error:
            if error.errno not in FULL:
                raise
            where = f"{error.filename}: " if error.filename else ""
            raise UserError(f"{where}{error.strerror}; what was written before stays") from None

    return told
