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
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from utils.config.files import backbone_names, backbone_node
from utils.config.signature import check_keywords, join, refused_keyword
from utils.errors import UserError, one_line
from utils.nearest import nearest
from utils.ranges import OutOfRange

ALLOWED = (
    *("octic", "vit", "dinov2", "deit", "baselines", "evaluation", "utils"),
    *("torch.optim", "torchvision.transforms", "timm.optim"),
)
ROOT = Path(__file__).resolve().parents[2]
_WORDS = {"_target_", "_partial_"}


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
            check_keywords(target, _keywords(node, where), where, partial=True)
        for key, value in node.items():
            check_targets(value, join(where, key))


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
    module = _imported(module_name, target, prefix)
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


def _imported(module_name: str, target: str, prefix: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        lacks = error.name if isinstance(error, ModuleNotFoundError) else None
        if lacks and f"{module_name}.".startswith(f"{lacks}."):
            own = any(f"{package}.".startswith(f"{lacks}.") for package in own_packages())
            hint = "; its folder belongs on PYTHONPATH" if own else _elsewhere(target)
            raise UserError(f"{prefix}there is no module {lacks!r} (in {target!r}){hint}") from None
        if not is_own(target):
            raise  # ours: an optional package that the module itself needs
        raise UserError(
            f"{prefix}{module_name} cannot be imported: {_unforeseen(error)}"
        ) from error


def _elsewhere(target: str) -> str:
    """A hint, if exactly one module of that name lies in another folder of the package."""
    package, *_, stem, name = target.split(".")
    found = list((ROOT / package).rglob(f"{stem}.py")) if package in ALLOWED else []
    if len(found) != 1:
        return ""
    module = ".".join(found[0].relative_to(ROOT).with_suffix("").parts)
    return f"; did you mean {f'{module}.{name}'!r}?"


def _build(node: Any, where: str, extra: Mapping[str, Any]) -> Any:
    if isinstance(node, list):
        return [_build(value, f"{where}[{index}]", {}) for index, value in enumerate(node)]
    if not isinstance(node, dict):
        return node
    if "_target_" not in node:
        if extra or _WORDS & node.keys():
            raise UserError(f"{where or 'the node'} has no _target_, so it cannot be built")
        return {key: _build(value, join(where, key), {}) for key, value in node.items()}
    target = resolve(node["_target_"], where)
    given = _keywords(node, where)
    partial = bool(node.get("_partial_", False))
    check_keywords(target, given | dict(extra), where, partial=partial)
    keywords = {
        key: _build(value, join(where, key), {}) for key, value in given.items() if key not in extra
    }
    keywords |= extra
    if partial:
        factory = Factory(target, **keywords)
        factory.where = where
        return factory
    return _call(target, where, keywords, own=given)


class Factory(functools.partial):
    """A `_partial_` node: a `functools.partial` whose complaints name the config key."""

    where: str = ""

    def __call__(self, /, *args: Any, **keywords: Any) -> Any:
        """Build it, with further keywords."""
        made = functools.partial(self.func, *args)
        return _call(made, self.where, {**self.keywords, **keywords}, own=self.keywords)


def _call(
    target: Callable[..., Any], where: str, keywords: Mapping[str, Any], own: Mapping[str, Any]
) -> Any:
    # own: those of the keywords that the config gives.
    prefix = f"{where}: " if where else ""
    try:
        return target(**keywords)
    except OutOfRange as error:
        raise UserError(join(where, error)) from error
    except UserError:
        raise
    except Exception as error:  # a value of the right kind that the constructor cannot handle
        if _imports(getattr(error, "unregistered", "")):
            return _call(target, where, keywords, own)
        if isinstance(error, ValueError) and raised_by_us(error):
            raise UserError(prefix + one_line(error)) from error
        message = (
            refused_keyword(error, target, where, own) if isinstance(error, TypeError) else None
        )
        said = message or f"cannot be built with these values: {_unforeseen(error)}"
        raise UserError(prefix + said) from error


def _imports(model: str) -> bool:
    """Import what may register a model with timm; False if there is nothing new.

    This is the module of ours that has it, or else the packages that the environment offers. A
    folder in the hub's format names its model, but no package.
    """
    if not model:
        return False
    if model in backbone_names():
        modules, prefix = [backbone_node(model)["_target_"].rpartition(".")[0]], ""
    else:
        modules, prefix = [*own_packages()], "OCTIC_PACKAGES: "
    new = [module for module in modules if module not in sys.modules]
    for module in new:
        _imported(module, module, prefix)
    return bool(new)


def _unforeseen(error: Exception) -> str:
    said = error.msg if isinstance(error, SyntaxError) else error
    return f"{type(error).__name__}: {one_line(said)[:300]}{place_of(error)}"


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


def place_of(error: BaseException) -> str:
    """` (file:line)` of a traceback's last line that is ours or in a user's package; "" if none.

    Of a file that Python cannot read: the line that is at fault.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
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
