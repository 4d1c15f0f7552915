"""Checks of settings, for constructors; the error begins with the key as the config spells it.

NaN is in no range, and an infinite value only where the range is said to have no end.
"""

import math
from collections.abc import Collection, Sequence
from pathlib import Path

from utils.errors import UserError
from utils.nearest import nearest


class OutOfRange(UserError):
    """A value without a meaning. The message begins with its keyword; `build` adds where."""


def check_range(
    key: str, value: float, low: float = 0.0, high: float = math.inf, *, ends: str = "[]"
) -> None:
    """OutOfRange unless `value` is finite and lies between `low` and `high`.

    ends: `[` or `]` where an end belongs to the range, `(` or `)` where it does not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise OutOfRange(f"{key} must be a number, not {value!r}")
    above = value > low if ends[0] == "(" else value >= low
    below = value < high if ends[1] == ")" else value <= high
    if not (above and below and math.isfinite(value)):
        raise OutOfRange(f"{key} must {_in_words(low, high, ends)}, not {value}")


def check_count(key: str, value: int, least: int = 0) -> None:
    """OutOfRange unless `value` is a whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OutOfRange(f"{key} must be a whole number from {least}, not {value!r}")


def check_counts(least: int = 0, /, **values: int) -> None:
    """OutOfRange unless each of the values is a whole number from `least` on."""
    for key, value in values.items():
        check_count(key, value, least)


def check_sizes(**values: int | None) -> None:
    """OutOfRange unless each of the values is None, or a whole number from 1 on."""
    check_counts(1, **{key: value for key, value in values.items() if value is not None})


def check_path(key: str, value: str | Path) -> None:
    """OutOfRange unless `value` is text: as a number, a path would not be what was written."""
    if not isinstance(value, str | Path):
        raise OutOfRange(f"{key} must be text, a path, not {value!r}: quote it as '\"...\"'")


def check_flags(**values: bool) -> None:
    """OutOfRange unless each of the values is true or false: a word such as "no" would be true."""
    for key, value in values.items():
        if not isinstance(value, bool):
            raise OutOfRange(f"{key} must be true or false, not {value!r}")


def check_share(key: str, value: float) -> None:
    """OutOfRange unless `value` is a share, or a probability: in [0, 1]."""
    check_range(key, value, 0.0, 1.0)


def check_rate(key: str, value: float) -> None:
    """OutOfRange unless `value` is a share of things that leaves some: in (0, 1]."""
    check_range(key, value, 0.0, 1.0, ends="(]")


def check_word(key: str, word: str, known: Collection[str]) -> None:
    """OutOfRange unless `word` is one of those known."""
    if word not in list(known):  # a list, which also takes what has no hash
        hint = nearest(word, known)
        raise OutOfRange(f"{key} must be one of {', '.join(known)}, not {word!r}{hint}")


def check_words(key: str, words: Sequence[str], known: Collection[str]) -> None:
    """OutOfRange unless there is at least one word, and each is one of those known."""
    if isinstance(words, str) or not words:
        raise OutOfRange(f"{key} must be a list of {', '.join(known)}, not {words!r}")
    for word in words:
        check_word(key, word, known)


def check_list(key: str, values: Sequence[float], low: float, *, ends: str = "[)") -> list:
    """The values as a list; OutOfRange if there are none, one is repeated or one is too low.

    ends: `[)` where `low` itself belongs to the range, `()` where it does not.
    """
    for value in check_distinct(key, values):
        check_range(key, value, low, ends=ends)
    return list(values)


def check_distinct(key: str, values: Sequence[float]) -> list:
    """The values as a list; OutOfRange if there are none, or one is repeated."""
    if not values or len(set(values)) < len(values):
        raise OutOfRange(f"{key} needs values, each of them once, not {list(values)}")
    return list(values)


def check_order(
    key: str, values: Sequence[float], low: float, high: float, *, ends: str = "[]"
) -> None:
    """OutOfRange unless `values` are a least and a greatest one within the range."""
    if len(values) != 2:
        raise OutOfRange(f"{key} takes two values, the least and the greatest, not {list(values)}")
    for value in values:
        check_range(key, value, low, high, ends=ends)
    if values[0] > values[1]:
        raise OutOfRange(f"{key} takes the lesser value first, not {list(values)}")


def _in_words(low: float, high: float, ends: str) -> str:
    if math.isinf(high):
        return f"be finite and {'above' if ends[0] == '(' else 'at least'} {low:g}"
    return f"lie in {ends[0]}{low:g}, {high:g}{ends[1]}"
