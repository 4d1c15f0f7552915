"""Read the contents of a folder of a training, of an evaluation, or of several runs.

No file is required; files that cannot be read are left out and noted.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from evaluation.report.figures import flat
from utils.errors import UserError
from utils.run_files import CHECKPOINTS, CODE, CONFIG, CURVES, METRICS, RESULTS, SUMMARY

REPORT = "report.html"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
RUN_MARKS = (CONFIG, METRICS, SUMMARY)
# Too many, too large or of no interest to a reader; checkpoints are listed as folders.
SKIPPED = {CHECKPOINTS, "slurm", "logs", "wandb", "__pycache__"}
MOST_FILES = 40


@dataclass
class Results:
    """One probe's figures, as a results.json has them, with what they depend on."""

    probe: str
    source: str
    figures: dict[str, Any]
    protocol: dict[str, Any]


@dataclass
class Contents:
    """The contents of a folder; `runs` are the runs in folders below it."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    code: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, float]] = field(default_factory=list)
    results: list[Results] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    files: list[tuple[str, int]] = field(default_factory=list)  # name, bytes
    checkpoints: list[tuple[str, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    runs: list["Contents"] = field(default_factory=list)
    began: datetime | None = None
    ended: datetime | None = None

    @property
    def name(self) -> str:
        """The run's own name, else the folder's."""
        return str(self.config.get("name") or self.summary.get("name") or self.folder.name)


def collect(folder: str | Path) -> Contents:
    """Read a folder; UserError, in one line, if it is missing or has nothing to report."""
    folder = Path(folder)
    try:
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise UserError(f"{folder} {what}; give the folder of a run or of an evaluation")
        found = _read(folder.resolve())
    except OSError as error:
        raise UserError(f"cannot read {error.filename or folder}: {error.strerror}") from None
    if not _holds_anything(found):
        raise UserError(
            f"{folder} holds nothing to report: no {', '.join(RUN_MARKS)}, {RESULTS} or picture"
        )
    return found


def _read(folder: Path) -> Contents:
    found = Contents(folder)
    found.config_text = _text(found, CONFIG)
    found.config = _mapping(found, CONFIG, found.config_text, yaml.safe_load)
    found.summary = _mapping(found, SUMMARY, _text(found, SUMMARY), json.loads)
    found.code = _text(found, CODE).strip()
    found.metrics = _metrics(found)
    _walk(found, folder)
    found.results = _once(found.results)
    found.results += _from_summary(found)
    found.checkpoints = _checkpoints(found)
    found.began, found.ended = _times(folder)
    return found


def _walk(found: Contents, folder: Path) -> None:
    """Collect results, pictures and files of `folder` and its subfolders that are no runs."""
    for path in sorted(folder.iterdir(), key=_natural):
        if path.name.startswith(".") or path.is_symlink():
            continue
        name = path.relative_to(found.folder).as_posix()
        try:
            _take(found, path, name)
        except OSError as error:  # closed to this reader, or removed meanwhile
            found.notes.append(f"{name}: {error.strerror}")


def _take(found: Contents, path: Path, name: str) -> None:
    if path.is_dir():
        if path.name in SKIPPED:
            return
        if any((path / mark).is_file() for mark in RUN_MARKS):
            found.runs.append(_read(path))
        else:
            _walk(found, path)
    elif path.name == RESULTS:
        found.results += _results(found, name)
    elif path.suffix.lower() in PICTURES:
        # The page draws the curves itself.
        if not (path.name == CURVES and found.metrics):
            found.pictures.append(path)
    elif path.name not in (*RUN_MARKS, CODE, REPORT):
        found.files.append((name, path.stat().st_size))


def _results(found: Contents, name: str) -> list[Results]:
    content = _mapping(found, name, _text(found, name), json.loads)
    results = []
    for probe, entry in content.items():
        if isinstance(entry, Mapping) and isinstance(entry.get("figures"), Mapping):
            protocol = entry.get("protocol")
            protocol = dict(protocol) if isinstance(protocol, Mapping) else {}
            results.append(Results(str(probe), name, dict(entry["figures"]), protocol))
        else:
            found.notes.append(f"{name}: {probe} has no figures")
    return results


def _once(results: list[Results]) -> list[Results]:
    """Each evaluation once: a probe's own folder has all its figures, RESULTS above it the net.

    The two belong together if their protocols agree in all that both say.
    """
    above = {result.probe: result for result in results if result.source == RESULTS}
    kept = []
    for result in results:
        short = above.get(result.source.removesuffix(f"/{RESULTS}"))
        if short and all(result.protocol.get(k, v) == v for k, v in short.protocol.items()):
            # The same figures have plainer names there.
            more = len(flat(result.figures)) > len(flat(short.figures))
            figures = result.figures if more else short.figures
            protocol = result.protocol | short.protocol
            kept.append(Results(short.probe, result.source, figures, protocol))
            del above[short.probe]
        elif result.source != RESULTS:
            kept.append(result)
    return kept + list(above.values())


def _from_summary(found: Contents) -> list[Results]:
    """Figures that only the summary has, with the settings of their probes."""
    probes = found.config.get("probes")
    probes = probes if isinstance(probes, Mapping) else {}
    known = {result.probe for result in found.results}
    parts: dict[str, dict[str, Any]] = {}
    for key, value in found.summary.items():
        probe, _, figure = key.partition("/")
        if probe in probes and probe not in known:
            parts.setdefault(probe, {})[figure] = value
    return [
        Results(probe, SUMMARY, figures, dict(probes[probe] or {}))
        for probe, figures in parts.items()
    ]


def _metrics(found: Contents) -> list[dict[str, float]]:
    lines, broken = [], 0
    for text in _text(found, METRICS).splitlines():
        try:
            line = json.loads(text)
            step = int(line["step"])
            numbers = {k: v for k, v in line.items() if isinstance(v, int | float) or v is None}
            values = {k: math.nan if v is None else float(v) for k, v in numbers.items()}
            lines.append(values | {"step": step})
        except (ValueError, KeyError, TypeError, OverflowError):  # the last: Infinity
            broken += 1
    if broken:
        found.notes.append(f"{METRICS}: {broken} of {broken + len(lines)} lines cannot be read")
    return lines


def _checkpoints(found: Contents) -> list[tuple[str, int]]:
    parent = found.folder / CHECKPOINTS
    try:
        steps = sorted(parent.iterdir(), key=_natural) if parent.is_dir() else []
        sizes = {
            path.name: sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            for path in steps
            if path.is_dir()
        }
    except OSError as error:  # closed to this reader, or removed meanwhile
        found.notes.append(f"checkpoints: {error.strerror}")
        return []
    return [(f"checkpoints/{name}", size) for name, size in sizes.items()]


def _times(folder: Path) -> tuple[datetime | None, datetime | None]:
    marks = [*RUN_MARKS, CODE, RESULTS]
    times = [(folder / mark).stat().st_mtime for mark in marks if (folder / mark).is_file()]
    if not times:
        return None, None
    first, last = (datetime.fromtimestamp(time) for time in (min(times), max(times)))
    return first, last


def _text(found: Contents, name: str) -> str:
    path = found.folder / name
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        found.notes.append(f"{name}: {os.strerror(error.errno or 0)}")
        return ""


def _mapping(found: Contents, name: str, text: str, read: Any) -> dict[str, Any]:
    if not text:
        return {}
    try:
        content = read(text)
    except (ValueError, yaml.YAMLError) as error:
        found.notes.append(f"{name} cannot be read: {str(error).splitlines()[0]}")
        return {}
    if not isinstance(content, dict):
        found.notes.append(f"{name} is no mapping")
        return {}
    return {str(key): value for key, value in content.items()}


def _natural(path: Path) -> tuple[bool, int, str]:
    """Numbers by value, before names."""
    return not path.name.isdecimal(), int(path.name) if path.name.isdecimal() else 0, path.name


def _holds_anything(found: Contents) -> bool:
    return bool(
        found.config_text
        or found.summary
        or found.metrics
        or found.results
        or found.pictures
        or found.runs
    )
