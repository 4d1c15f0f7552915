"""What a command says of a mistake that shows late: one line of ours, and nothing of others'."""

import errno
import json

import pytest

from evaluation.mistakes import mistakes_in_one_line
from utils.errors import UserError
from vit.trunk import take_indices


def test_a_mistake_of_the_user_is_one_line() -> None:
    with pytest.raises(UserError, match=r"\(vit/trunk.py:\d+\)$") as told:
        mistakes_in_one_line(take_indices)([-9], 4)
    assert "\n" not in str(told.value)


def test_a_full_disk_is_one_line() -> None:
    @mistakes_in_one_line
    def write(number: int) -> None:
        raise OSError(number, "No space left on device", "results.json")

    with pytest.raises(UserError, match="results.json: No space left on device; what was written"):
        write(errno.ENOSPC)
    with pytest.raises(OSError, match="results.json"):
        write(errno.EIO)


def test_an_error_of_other_code_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="Expecting value") as raised:
        mistakes_in_one_line(json.loads)("x")
    assert not isinstance(raised.value, UserError)
