"""Keywords of a net, checked against the annotations of its class before it is built.

A model's function takes any keyword (`vit.models.entrypoint`), so that only the class's constructor
says of what kind each is; unchecked, a word such as "no" would be true.
"""

import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    types.NoneType: "null",
    Mapping: "a mapping",
}
_LISTS = (list, tuple, Sequence)


def check_keywords(model_class: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """ValueError for a value of another kind than its annotation, or a number without a meaning.

    Every number of a net is finite and at least 0, a rate at most 1; what else holds for one, the
    constructor checks. Keywords that the class does not name are left to it.
    """
    annotations = _annotations(model_class)
    for key, value in given.items():
        if key in annotations:
            _check_kind(key, value, annotations[key])
            if isinstance(value, Real) and not isinstance(value, bool):
                _check_number(key, float(value))


def _annotations(model_class: Callable[..., Any]) -> dict[str, Any]:
    """Those of the constructor, and of its bases' where it passes keywords on."""
    if not isinstance(model_class, type):
        return typing.get_type_hints(model_class)
    found: dict[str, Any] = {}
    for base in reversed(model_class.__mro__[:-1]):
        if "__init__" in vars(base):
            found |= typing.get_type_hints(vars(base)["__init__"])
    return found


def _check_kind(key: str, value: Any, annotation: Any) -> None:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    options = typing.get_args(annotation) if is_union else (annotation,)
    kinds = [typing.get_origin(option) or option for option in options]
    if not any(_is_of(value, kind) for kind in kinds):
        words = " or ".join("a list" if kind in _LISTS else _WORDS[kind] for kind in kinds)
        raise ValueError(f"{key} must be {words}, not {value!r}")


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of that kind; True of a kind that is not decided here."""
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if kind in _LISTS:
        return isinstance(value, Sequence) and not isinstance(value, str)
    return kind not in _WORDS or isinstance(value, kind)


def _check_number(key: str, value: float) -> None:
    is_rate = key.endswith("_rate")
    if not (math.isfinite(value) and 0 <= value <= (1 if is_rate else math.inf)):
        range_ = "lie in [0, 1]" if is_rate else "be finite and at least 0"
        raise ValueError(f"{key} must {range_}, not {value:g}")
