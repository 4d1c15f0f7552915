"""Checks of the options of reducers, made where the options are given.

Options come from files and command lines without type checks: a word instead of a number would
fail deep inside, or not at all.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from utils.ranges import OutOfRange, check_count, check_rate

FORMS = ("sound", "published")


def each(key: str, value: Any, check: Callable[[str, Any], None]) -> list[Any]:
    """One number, or several, as a list; OutOfRange for what is neither or fails its `check`."""
    if isinstance(value, int | float):
        check(key, value)
        return [value]
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise OutOfRange(f"{key} must be a number or a list of numbers, not {value!r}")
    found = list(value)
    for index, entry in enumerate(found):
        check(f"{key}[{index}]", entry)
    return found


def block_list(key: str, value: Any) -> list[int]:
    """One block, or several, as a list; OutOfRange for anything that is not a block number."""
    return each(key, value, check_count)


def rates_of_blocks(key: str, value: Any) -> list[float] | dict[int, float]:
    """A rate for every block, or for some as {block: rate}; OutOfRange for anything else.

    The numbers of blocks may be text, as the keys of a file are.
    """
    if isinstance(value, int | float):
        raise OutOfRange(f"{key} must be a list with a rate for every block, not {value!r}")
    if not isinstance(value, Mapping):
        return each(key, value, check_rate)
    found = {}
    for block, rate in value.items():
        number = int(block) if isinstance(block, str) and block.isdecimal() else block
        check_count(f"a block of {key}", number)
        check_rate(f"{key}[{number}]", rate)
        found[number] = rate
    return found
