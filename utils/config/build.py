"""Build objects from config nodes, restricted to a short list of packages.

The environment variable OCTIC_PACKAGES=mine,yours adds packages of the user. A config cannot add
any, because configs also come from other people.

A node is a mapping with `_target_` (the dotted name of a class or function), keywords, and, if the
caller adds the rest later, `_partial_: true`. The constructor's signature is the schema: an unknown
keyword or a value of the wrong kind gives a one-line error with the place and the nearest known
word. This module needs neither Hydra nor torch, so it works on plain dictionaries too.
"""

import functools
import importlib
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError, one_line
from utils.nearest import nearest
from utils.ranges import OutOfRange

ALLOWED = (
    *("octic", "vit", "dinov2", "deit", "baselines", "evaluation", "utils"),
    *("torch.optim", "torchvision.transforms", "timm.optim"),
)
ROOT = Path(__file__).resolve().parents[2]
_WORDS = {"_target_", "_partial_"}
_COLLECTIONS = (Sequence, Iterable, Collection)
_PLAIN = (bool, int, float, str, list, dict, type(None))


def build(node: Any, /, **extra: Any) -> Any:
    """The object a config node describes; `extra` adds keywords, or replaces those of the config.

    Raises `UserError` for a target that is not offered and for keywords its signature refuses.
    """
    where = node._get_full_key(None) if hasattr(node, "_get_full_key") else ""
    return _build(plain(node), where, extra)


def check_targets(node: Any, /, where: str = "") -> None:
    """Check the keywords of every target in a node against its signature, without building."""
    node = plain(node)
    if isinstance(node, list):
        for index, value in enumerate(node):
            check_targets(value, f"{where}[{index}]")
    elif isinstance(node, dict):
        if "_target_" in node:
            target = resolve(node["_target_"], where)
            _check_keywords(target, _keywords(node, where), where, partial=True)
        for key, value in node.items():
            check_targets(value, _join(where, key))


def resolve(target: object, where: str = "") -> Callable[..., Any]:
    """The class or function of a dotted name, if it is defined in an allowed package.

    What counts is the module that defines the object, not the dotted name: objects that a module
    only imported, such as `utils.x.os.system`, are refused.
    """
    prefix = f"{where}: " if where else ""
    refused = f"{prefix}{target!r} cannot be built from a config"
    if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", target):
        raise UserError(
            f"{prefix}_target_ must be a dotted name such as octic.models.x, got {target!r}"
        )
    if not _offered(target) and not target.startswith("timm."):
        own = own_packages()
        wanted = ",".join((*own, target.partition(".")[0]))  # keeps those that are set already
        raise UserError(
            f"{refused}; offered are {', '.join((*ALLOWED, *own))}, timm.create_model "
            f"and timm's models; what is yours: OCTIC_PACKAGES={wanted} in the environment"
        )
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # an optional package that the module itself needs
        path = "; its folder belongs on PYTHONPATH" if error.name in own_packages() else ""
        raise UserError(
            f"{prefix}there is no module {error.name!r} (in {target!r}){path or _elsewhere(target)}"
        ) from None
    if not hasattr(module, name):
        public = [word for word in vars(module) if not word.startswith("_")]
        raise UserError(f"{prefix}{module_name} has no {name!r}{nearest(name, public)}")
    found = getattr(module, name)
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        raise UserError(f"{refused}: it is neither a class nor a function")
    if not _offered(f"{found.__module__}.{found.__qualname__}") and not _is_timm_model(found):
        raise UserError(f"{refused}: it is defined in {found.__module__}")
    return found


def own_packages() -> tuple[str, ...]:
    """The packages that the environment adds to those offered (OCTIC_PACKAGES)."""
    names = os.environ.get("OCTIC_PACKAGES", "").replace(",", " ").split()
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UserError(
                f"OCTIC_PACKAGES holds {name!r}; it must be names such as mine,yours.nets"
            )
    return tuple(names)


def is_own(target: object) -> bool:
    """Whether a dotted name lies in a package that the environment adds."""
    return any(str(target).startswith(f"{name}.") for name in own_packages())


def plain(node: Any) -> Any:
    """An OmegaConf node as dictionaries and lists, interpolations resolved; others as they are."""
    if hasattr(node, "_get_full_key"):
        omegaconf: Any = sys.modules["omegaconf"]  # already imported, as the node is from it
        return omegaconf.OmegaConf.to_container(node, resolve=True)
    return node


def _elsewhere(target: str) -> str:
    """A hint, if exactly one module of that name lies in another folder of the package."""
    package, *_, stem, name = target.split(".")
    found = list((ROOT / package).rglob(f"{stem}.py")) if package in ALLOWED else []
    if len(found) != 1:
        return ""
    module = ".".join(found[0].relative_to(ROOT).with_suffix("").parts)
    return f"; did you mean {f'{module}.{name}'!r}?"


def keywords_of(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a target that can be given by name."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {n: p for n, p in inspect.signature(target).parameters.items() if p.kind in kinds}


def _build(node: Any, where: str, extra: Mapping[str, Any]) -> Any:
    if isinstance(node, list):
        return [_build(value, f"{where}[{index}]", {}) for index, value in enumerate(node)]
    if not isinstance(node, dict):
        return node
    if "_target_" not in node:
        if extra or _WORDS & node.keys():
            raise UserError(f"{where or 'the node'} has no _target_, so it cannot be built")
        return {key: _build(value, _join(where, key), {}) for key, value in node.items()}
    target = resolve(node["_target_"], where)
    given = _keywords(node, where)
    partial = bool(node.get("_partial_", False))
    _check_keywords(target, given | dict(extra), where, partial=partial)
    keywords = {
        key: _build(value, _join(where, key), {})
        for key, value in given.items()
        if key not in extra
    }
    keywords |= extra
    if partial:
        factory = Factory(target, **keywords)
        factory.where = where
        return factory
    return _call(target, where, keywords)


class Factory(functools.partial):
    """A `_partial_` node: a `functools.partial` whose complaints name the config key."""

    where: str = ""

    def __call__(self, /, *args: Any, **keywords: Any) -> Any:
        """Build it, with further keywords."""
        return _call(functools.partial(self.func, *args), self.where, {**self.keywords, **keywords})


def _call(target: Callable[..., Any], where: str, keywords: Mapping[str, Any]) -> Any:
    prefix = f"{where}: " if where else ""
    try:
        return target(**keywords)
    except OutOfRange as error:
        raise UserError(_join(where, error)) from error
    except UserError:
        raise
    except Exception as error:  # a value of the right kind that the constructor cannot handle
        if isinstance(error, ValueError) and raised_by_us(error):
            raise UserError(prefix + one_line(error)) from error
        message = _refused_keyword(error, target) if isinstance(error, TypeError) else None
        said = one_line(error)[:300]
        unforeseen = f"cannot be built with these values: {type(error).__name__}: {said}"
        raise UserError(prefix + (message or unforeseen + place_of(error))) from error


def _keywords(node: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key in node:
        if not isinstance(key, str):
            raise UserError(f"{where}: {key!r} is no keyword")
        if key.startswith("_") and key.endswith("_") and key not in _WORDS:
            raise UserError(f"{where}: {key} is not understood; there are _target_ and _partial_")
    return {key: value for key, value in node.items() if key not in _WORDS}


def _offered(name: str) -> bool:
    return any(name.startswith(f"{package}.") for package in (*ALLOWED, *own_packages()))


def _is_timm_model(found: Callable[..., Any]) -> bool:
    """Whether it is a model of timm or `create_model`; other functions of timm may read files."""
    if not found.__module__.startswith("timm."):
        return False
    import timm

    return found is timm.create_model or timm.is_model(found.__name__)


def _check_keywords(
    target: Callable[..., Any], given: Mapping[str, Any], where: str, *, partial: bool
) -> None:
    name, prefix = target.__qualname__, f"{where}: " if where else ""
    known = keywords_of(target)
    parameters = inspect.signature(target).parameters.values()
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    unknown = [] if open_ended else [key for key in given if key not in known]
    if unknown:
        raise UserError(f"{prefix}{_unknown(name, unknown[0], known)}{_left_out(unknown, where)}")
    missing = [n for n, p in known.items() if p.default is p.empty and n not in given]
    if missing and not partial:
        raise UserError(f"{prefix}{name} also needs {', '.join(missing)}")
    hints = _hints(target)
    for key, value in given.items():
        if key in hints and not _fits(value, hints[key]):
            raise UserError(f"{_join(where, key)} must be {_kind(hints[key])}, got {value!r}")


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


def _left_out(unknown: Sequence[str], where: str) -> str:
    """A hint how to drop several unknown keywords, left by a run file for another target."""
    words = " ".join(f"'~{_join(where, key)}'" for key in unknown)
    return f"; to leave out what the file gives another: {words}" if len(unknown) > 1 else ""


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


def _refused_keyword(error: TypeError, target: Callable[..., Any]) -> str | None:
    """The error line for an unexpected keyword of the target or of a function that it calls.

    None if the TypeError is about something else.
    """
    match = re.search(
        r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'", str(error)
    )
    if match is None:
        return None
    name, key = match.groups()
    frame, found = error.__traceback__, getattr(target, "func", target)
    found = found if getattr(found, "__name__", "") == name else None
    while frame is not None:  # look the name up in the globals of the calling frames
        found = frame.tb_frame.f_globals.get(name, found)
        frame = frame.tb_next
    return _unknown(name, key, keywords_of(found)) if callable(found) else str(error)


def place_of(error: BaseException) -> str:
    """` (file:line)` of a traceback's last line that is ours or in a user's package; "" if none."""
    place, frame = "", error.__traceback__
    while frame is not None:
        file = Path(frame.tb_frame.f_code.co_filename).resolve()
        module = frame.tb_frame.f_globals.get("__name__", "")
        if ROOT in file.parents and "site-packages" not in file.parts and file != Path(__file__):
            place = f" ({file.relative_to(ROOT)}:{frame.tb_lineno})"
        elif any(f"{module}.".startswith(f"{package}.") for package in own_packages()):
            place = f" ({file}:{frame.tb_lineno})"
        frame = frame.tb_next
    return place


def raised_by_us(error: BaseException) -> bool:
    """Whether the innermost frame lies in this repository: then the message is meant for users."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    file = Path(frame.tb_frame.f_code.co_filename if frame else sys.executable).resolve()
    return ROOT in file.parents and "site-packages" not in file.parts


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)
