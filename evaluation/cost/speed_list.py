"""The list of measurements of configs/speed.yaml, and of a user's own file of that kind."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from utils.errors import UserError, one_line
from utils.nearest import nearest

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "configs" / "speed.yaml"
DEVICES = ("cuda", "cpu")
NEEDED, OPTIONAL = ("tells", "command", "minutes"), ("twin", "discard")
TAKEN = ("state", "table", "before")  # names that the folder needs itself


class Measurement(NamedTuple):
    """One command of a list: its script and words, in which {out} and {workers} are filled in."""

    name: str
    tells: str
    words: tuple[str, ...]
    minutes: float
    twin: str | None = None  # measurement of the plain net
    discard: tuple[str, ...] = ()  # below the folder {out}, once it has ended

    def filled(self, folder: Path, workers: int) -> list[str]:
        """The words as they are run, with outputs named after the measurement in `folder`."""
        values = {"{out}": str(folder / self.name), "{workers}": str(workers)}
        found = []
        for word in self.words:
            for mark, value in values.items():
                word = word.replace(mark, value)
            found.append(word)
        return found


def read_list(device: str, file: Path | None = None) -> list[Measurement]:
    """The measurements for a device of `DEVICES`, in order; UserError, one line, for a mistake."""
    path = file or FILE
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {one_line(error)}") from None
    if not isinstance(content, dict) or not content.keys() <= set(DEVICES):
        raise UserError(f"{path} must have lists for {' and '.join(DEVICES)}, and nothing else")
    nodes = content.get(device)
    if not isinstance(nodes, dict) or not nodes:
        raise UserError(f"{path} has no measurements for {device}")
    found = [_read(f"{path}: {name}", str(name), node) for name, node in nodes.items()]
    for entry in found:
        others = [other.name for other in found if other is not entry]
        if entry.twin is not None and entry.twin not in others:
            hint = nearest(entry.twin, others)
            raise UserError(f"{path}: {entry.name}: there is no twin {entry.twin!r}{hint}")
    return found


def choose(measurements: list[Measurement], only: str) -> list[Measurement]:
    """Those that are named, with commas between, in the order of the list; all without a name."""
    known = [entry.name for entry in measurements]
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in known:
            hint = nearest(name, known)
            raise UserError(f"there is no measurement {name!r}{hint} ({', '.join(known)})")
    return [entry for entry in measurements if not names or entry.name in names]


def script_of(word: str) -> Path:
    """A script as it is given, else in the checkout; UserError where there is none."""
    for path in (Path(word), ROOT / word):
        if path.is_file():
            return path
    ours = [f"experiments/{path.name}" for path in (ROOT / "experiments").glob("*.py")]
    raise UserError(f"there is no script {word}{nearest(word, ours)}")


def _read(where: str, name: str, node: Any) -> Measurement:
    if not re.fullmatch(r"\w[\w-]*", name) or name in TAKEN:
        raise UserError(f"{where}: a name is letters, digits, - and _, and none of {TAKEN}")
    if not isinstance(node, dict):
        raise UserError(f"{where} must be {', '.join(NEEDED)}")
    _check_keys(where, node)
    for key in ("tells", "command"):
        if not isinstance(node[key], str):
            raise UserError(f"{where}: {key} must be text, not {node[key]!r}")
    minutes = node["minutes"]
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not minutes > 0:
        raise UserError(f"{where}: minutes must be more than 0, got {minutes!r}")
    try:
        words = shlex.split(node["command"])
        script_of(words[0] if words else "")
    except ValueError as error:  # a quote that is not closed, or no such script
        raise UserError(f"{where}: {error}") from None
    discard = node.get("discard") or []
    if not isinstance(discard, list) or not all(re.fullmatch(r"\w[\w-]*", str(d)) for d in discard):
        raise UserError(f"{where}: discard is a list of folders' names, not {discard!r}")
    return Measurement(
        name, node["tells"], tuple(words), minutes, node.get("twin"), tuple(map(str, discard))
    )


def _check_keys(where: str, node: Mapping[str, Any]) -> None:
    for key in node:
        if key not in NEEDED + OPTIONAL:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, NEEDED + OPTIONAL)}")
    for key in NEEDED:
        if key not in node:
            raise UserError(f"{where}: {key} is missing")
