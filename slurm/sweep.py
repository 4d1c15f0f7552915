"""`-m`: turn a command line with comma lists into one command line per point of a sweep.

The grammar is Hydra's: `a,b`, `choice(a,b)`, `range(1,4)` and, for groups, `glob(hybrid_*)` list
the values of a key. The points are all combinations, the last list varying fastest, as in Hydra's
basic sweeper.
"""

import itertools
import os
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from utils.config.files import CONFIGS
from utils.config.flags import FLAGS
from utils.errors import UserError

# Flags whose value may hold a comma that lists no points: nodes, partitions, names.
_PLAIN = ("cluster.", "launcher.", "output_dir", "name")
_SHARED = {name: flag.key for flag in FLAGS if flag.kind is not None for name in flag.names}
# Those in brackets or quotes belong to one value.
_COMMA = re.compile(r""",(?=(?:[^'"]|'[^']*'|"[^"]*")*$)(?![^(\[{]*[)\]}])""")


class Point(NamedTuple):
    """One combination: values by key, command line, and the folder's name like `lr=1,seed=0`."""

    values: dict[str, str]
    words: list[str]
    label: str


class _Choice(NamedTuple):
    """One item of a command line: its key, its values, and the words that stand for each value.

    A later choice of the same key replaces it; items with the key "" always stay.
    """

    key: str
    values: list[str]
    words: list[list[str]]


def points(words: list[str], lists: Mapping[str, str] | None = None) -> list[Point]:
    """Expand the lists in `words` to one point per combination; without a list there is one point.

    lists: a script's own flags whose value may be a list, each with the key that names its points.
    UserError for a sweep without discrete values, such as an interval, and for equal points.
    """
    choices = _choices(list(words), _SHARED | dict(lists or {}))
    last = {choice.key: index for index, choice in enumerate(choices) if choice.key}
    choices = [c for index, c in enumerate(choices) if not c.key or last[c.key] == index]
    listed = [choice for choice in choices if len(choice.words) > 1]
    names = _short_keys([choice.key for choice in listed])
    short = {choice.key: _short_values(choice.values) for choice in listed}
    found = []
    for picks in itertools.product(*(range(len(choice.words)) for choice in choices)):
        values, line, label = {}, [], []
        for choice, pick in zip(choices, picks, strict=True):
            line += choice.words[pick]
            if len(choice.words) > 1:
                values[names[choice.key]] = choice.values[pick]
                label.append(f"{names[choice.key]}={short[choice.key][pick]}")
        found.append(Point(values, line, ",".join(label)))
    labels = [point.label for point in found]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f"two points of the sweep have the same values: {twice}")
    return found


def _choices(words: list[str], keys: Mapping[str, str]) -> list[_Choice]:
    found = []
    while words:
        word = words.pop(0)
        name, has_value, value = word.partition("=")
        if name not in keys:
            found.append(_of_override(word) if not word.startswith("-") else _alone(word))
            continue
        rest = [] if has_value or not words else [words.pop(0)]
        value = value if has_value else "".join(rest)
        parts = [part.strip() for part in _COMMA.split(value)]
        # The run folders of a sweep have names like lr=1,seed=0.
        one = keys[name].startswith(_PLAIN) or os.path.exists(os.path.expanduser(value))
        if len(parts) < 2 or one:
            found.append(_Choice("", [""], [[word, *rest]]))
        elif not all(parts):
            raise UserError(f"{name} {value}: a value of the list is empty")
        else:
            found.append(_Choice(keys[name], parts, [[f"{name}={part}"] for part in parts]))
    return found


def _of_override(word: str) -> _Choice:
    """The choice of a word key=value; its key is kept so that a later word can replace it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        loader: Any = _Groups()
        override = OverridesParser.create(config_loader=loader).parse_overrides([word])[0]
    except HydraException:
        return _alone(word)  # no override, or a malformed one: parsing the point reports it
    if override.is_delete():
        return _alone(word)
    start = override.get_key_element()
    key = start.lstrip("+")
    if not override.is_sweep_override():
        return _Choice(key, [""], [[word]])
    if not override.is_discrete_sweep():
        raise UserError(f"{word!r} has no list of values: a,b or choice(a,b) or range(1,4) has")
    if key in ("output_dir", "name"):
        raise UserError(
            f"{word!r}: every point has a folder below output_dir and a name of its own"
        )
    try:
        values = list(override.sweep_string_iterator())
    except HydraException as error:
        raise UserError(f"{word!r}: {str(error).splitlines()[0]}") from None
    if not values:
        raise UserError(f"{word!r} matches nothing")
    return _Choice(key, [_bare(value) for value in values], [[f"{start}={v}"] for v in values])


def _alone(word: str) -> _Choice:
    return _Choice("", [""], [[word]])


class _Groups:
    """Stands in for Hydra's config loader, which `glob` asks for the options of a group."""

    def get_group_options(self, group_name: str, *_: Any, **__: Any) -> list[str]:
        """The sorted names of a group's files, without .yaml."""
        return sorted(path.stem for path in (CONFIGS / group_name).glob("*.yaml"))


def _short_keys(keys: list[str]) -> dict[str, str]:
    """Each key's shortest dotted ending that no other key shares."""
    short = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        others = [other for other in keys if other != key]
        short[key] = next(
            (e for e in ends if not any(f".{other}".endswith(f".{e}") for other in others)), key
        )
    return short


def _bare(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def _short_values(values: list[str]) -> list[str]:
    """Values as parts of a folder's name; paths without the first and last parts that all share."""
    paths = [list(PurePath(value).parts) for value in values]
    if any("/" in value for value in values):
        for end in (0, -1):
            while min(map(len, paths)) > 1 and len({path[end] for path in paths}) == 1:
                for path in paths:
                    path.pop(end)
    return [re.sub(r"[^\w.+-]+", "_", "_".join(path)).strip("_") or "_" for path in paths]
