"""What a constructor's signature says of the keywords that a config gives it."""

import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.nearest import nearest

_COLLECTIONS = (Sequence, Iterable, Collection)
# What a run file can take away whole, by a file of configs/parts.
_PARTS = {
    "backbone": "no_backbone",
    "optimizer": "no_optimizer",
    "recipe.augmentation": "no_augmentation",
}
_PLAIN = (bool, int, float, str, list, dict, type(None))


def keywords_of(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a target that can be given by name."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {n: p for n, p in inspect.signature(target).parameters.items() if p.kind in kinds}


def check_keywords(
    target: Callable[..., Any], given: Mapping[str, Any], where: str, *, partial: bool
) -> None:
    """UserError for a keyword that the target lacks, a missing one, or a value of another kind.

    where: the node's place in the config, for the message. With `partial` the caller adds the rest.
    """
    name, prefix = target.__qualname__, f"{where}: " if where else ""
    known = keywords_of(target)
    parameters = inspect.signature(target).parameters.values()
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    unknown = [] if open_ended else [key for key in given if key not in known]
    if unknown:
        told = _unknown(name, unknown[0], known)
        raise UserError(f"{prefix}{told}{_left_out(unknown, known, where)}")
    missing = [n for n, p in known.items() if p.default is p.empty and n not in given]
    if missing and not partial:
        raise UserError(f"{prefix}{name} also needs {', '.join(missing)}")
    hints = _hints(target)
    for key, value in given.items():
        if key in hints and not _fits(value, hints[key]):
            raise UserError(f"{join(where, key)} must be {_kind(hints[key])}, got {value!r}")
        if any(isinstance(v, float) and math.isnan(v) for v in _items(value)):
            raise UserError(f"{join(where, key)} must be a number, not {value!r}")


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _kind(hint: Any) -> str:
    """An annotation in words, for error messages."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_kind(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) in (list, tuple, *_COLLECTIONS):
        items = [_kind(item) for item in typing.get_args(hint) if item not in (Ellipsis, Any)]
        return f"a list of {' and '.join(items)}" if items else "a list"
    name = hint.__name__ if inspect.isclass(hint) and not typing.get_args(hint) else str(hint)
    return words.get(hint) or name.replace("typing.", "").replace("collections.abc.", "")


def _unknown(name: str, key: str, known: Iterable[str]) -> str:
    return f"{name} takes no {key!r}{nearest(key, known)} (known: {', '.join(sorted(known))})"


def _left_out(unknown: Sequence[str], known: Iterable[str], where: str) -> str:
    """A hint how to drop unknown keywords, left by a run file for another target.

    A single one that resembles a known one is misspelt instead.
    """
    if not where or (len(unknown) == 1 and nearest(unknown[0], known)):
        return ""
    words = " ".join(f"'~{join(where, key)}'" for key in unknown)
    in_file = f", or all of it: /parts/{_PARTS[where]} in a run file" if where in _PARTS else ""
    return f"; to leave out what the file gives another: {words}{in_file}"


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # a name known to type checkers alone
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain config value fits the annotation `hint`; True if that cannot be decided."""
    if isinstance(value, dict) and "_target_" in value:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is typing.Literal:
        return value in arguments
    kind = origin or hint
    if not inspect.isclass(kind) or not isinstance(value, _PLAIN):
        return True
    if isinstance(value, list) and kind is tuple and arguments and Ellipsis not in arguments:
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    items = value if isinstance(value, list) and arguments else []
    if not all(_fits(item, arguments[0]) for item in items):
        return False
    if isinstance(value, bool):
        return kind in (bool, object, Any)
    if isinstance(value, str) and kind in _COLLECTIONS:
        return False  # a text as a sequence of letters is never meant
    wider = {int: (float,), str: (Path,), list: (tuple, set, frozenset)}.get(type(value), ())
    try:
        return isinstance(value, kind) or kind in wider
    except TypeError:  # a protocol that isinstance cannot check
        return True


def refused_keyword(
    error: TypeError, target: Callable[..., Any], where: str = "", own: Collection[str] = ()
) -> str | None:
    """The error line for an unexpected keyword of the target or of a function that it calls.

    where, own: the node's place in the config and its keys there, which can be left out. None if
    the TypeError is about something else.
    """
    match = re.search(
        r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'", str(error)
    )
    if match is None:
        return None
    name, key = match.groups()
    frame, found = error.__traceback__, getattr(target, "func", target)
    passed: Collection[str] = ()
    if getattr(found, "__name__", "") != name:  # look the name up in the target's module
        found = getattr(sys.modules.get(found.__module__), name, None)
    while frame is not None:  # and among the names of the calling frames
        scope = frame.tb_frame
        found = scope.f_locals.get(name, scope.f_globals.get(name, found))
        passed = _passed_on(scope)
        frame = frame.tb_next
    if not callable(found):
        return str(error)
    known = keywords_of(found)
    if key not in own:
        return _unknown(name, key, known)
    # Python names one; the call that failed had all of them.
    unknown = [key, *(k for k in passed if k in own and k not in known and k != key)]
    return _unknown(name, key, known) + _left_out(unknown, known, where)


def _passed_on(frame: types.FrameType) -> Collection[str]:
    """The names in a function's own `**keywords`, which it passes on; none without such."""
    code = frame.f_code
    if not code.co_flags & inspect.CO_VARKEYWORDS:
        return ()
    named = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    return frame.f_locals[code.co_varnames[named]]


def join(where: str, key: object) -> str:
    """The place in the config of a key of the node at `where`."""
    return f"{where}.{key}" if where else str(key)
