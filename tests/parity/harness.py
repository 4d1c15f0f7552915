"""Reads stored parity cases, finds the runner of each, and compares numbers.

A topic is a folder with an `index.json` (`{"topic": ..., "cases": [{"name": ..., "kind": ...}]}`)
and the files its cases name. A runner is a function `runner(case, folder)` that computes the case
with our code and calls `check`; it raises `NotBuilt` for what this project does not have yet.
Runners live in `<name>_cases.py` beside this file, each of which exports `RUNNERS`: a dict from a
key to a runner. A key is `(topic, what)`, or `what` alone in the file named after the topic
(`octic_cases.py`); `what` is, tried in this order, the name of a case, its `kind`, or the
beginning of its name (`"deit_*"`, the longest that fits); `"*"` takes whatever else is left.
"""

import functools
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Runner = Callable[[dict[str, Any], Path], None]

# Parts of an index that are a case each.
TABLES = ("schedule",)
# A gradient smaller than this share of the largest one of its case, in float64, is none.
ROUNDING = 1e-12
HERE = Path(__file__).resolve().parent


class NotBuilt(Exception):
    """The project does not offer what a case asks for: reported as not built, never as passed."""


@dataclass(frozen=True)
class Case:
    """One stored case: its topic, the folder that holds it, and its entry in the index."""

    topic: str
    folder: Path
    entry: dict[str, Any]

    @property
    def id(self) -> str:
        """`topic/name`, unique within one folder of topics."""
        return f"{self.topic}/{self.entry['name']}"


def collect(root: Path) -> list[Case]:
    """All cases of every `index.json` at or below `root`; ValueError if there is none."""
    indices = sorted(root.rglob("index.json")) if root.is_dir() else []
    if not indices:
        raise ValueError(f"no index.json in {root} or below it; give a folder of parity topics")
    cases = []
    for path in indices:
        index = json.loads(path.read_text())
        topic = index.get("topic", path.parent.name)
        entries = index["cases"] + index.get("json_cases", []) + _tables(index)
        cases += [Case(topic, path.parent, _with_shared_facts(entry, index)) for entry in entries]
    return cases


@functools.cache
def runners() -> dict[tuple[str, str], Runner]:
    """Runners of all `*_cases.py` beside this file; two for one key is our own mistake."""
    found: dict[tuple[str, str], Runner] = {}
    for path in sorted(HERE.glob("*_cases.py")):
        topic = path.stem.removesuffix("_cases")
        exported = importlib.import_module(f"tests.parity.{path.stem}").RUNNERS
        new = {key if isinstance(key, tuple) else (topic, key): exported[key] for key in exported}
        twice = found.keys() & new.keys()
        assert not twice, f"{path.name} and another file both run {sorted(twice)}"
        found |= new
    return found


def find_runner(case: Case, known: dict[tuple[str, str], Runner]) -> Runner:
    """The runner for a case by name, kind, longest `prefix*`, or `*`; NotBuilt if none fits."""
    name, kind = case.entry["name"], case.entry.get("kind")
    for key in (name, kind):
        if (case.topic, key) in known:
            return known[case.topic, key]
    prefixes = [
        key
        for topic, key in known
        if topic == case.topic and key.endswith("*") and name.startswith(key[:-1])
    ]
    if not prefixes:
        raise NotBuilt(f"no runner for {case.topic} {kind or name}")
    return known[case.topic, max(prefixes, key=len)]


def load(case: dict[str, Any], folder: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Tensors of a case (`in.*`, `state.*`, `out.*`, ...); floating ones as `dtype` where given."""
    file = case.get("file") or case.get("files", {}).get("tensors")
    if file is None:
        raise ValueError(f"case {case['name']} in {folder} names no file of tensors")
    tensors = load_file(folder / file)
    if dtype is None:
        return tensors
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in tensors.items()
    }


def strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose name starts with `prefix`, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def check(name: str, ours: Any, stored: Any, tol: Any, metric: str = "relative") -> None:
    """Assert that `ours` equals `stored` within `tol`; NaN and a wrong shape never pass.

    Metrics, b being the stored value:
    relative: max|a-b| <= tol * max|b| (octic, gevit, posthoc)
    floored: max|a-b| <= tol * max(max|b|, 1e-3) (recipes)
    absolute: max|a-b| <= tol
    close: |a-b| <= atol + rtol |b| for each entry, tol being {"atol": ..., "rtol": ...}
    exact: equal, tol being ignored
    """
    if metric == "exact" and not isinstance(stored, Tensor):
        assert ours == stored, f"{name}: {ours!r} where the stored value is {stored!r}"
        return
    a, b = _as_tensor(ours), _as_tensor(stored)
    assert a.shape == b.shape, f"{name}: shape {tuple(a.shape)}, stored {tuple(b.shape)}"
    if metric == "exact":
        assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {a.numel()} entries differ"
        return
    a, b = a.double(), b.double()
    error, scale = (a - b).abs(), b.abs()
    if metric == "close":
        excess = error - (tol.get("atol", 0.0) + tol.get("rtol", 0.0) * scale)
        fine, detail = bool((excess <= 0).all()), f"worst |a-b| {_top(error):.3e}, allowed {tol}"
    else:
        units = {"relative": _top(scale), "floored": max(_top(scale), 1e-3), "absolute": 1.0}
        bound = tol * units[metric]
        fine, detail = _top(error) <= bound, f"max|a-b| {_top(error):.3e}, allowed {bound:.3e}"
    assert fine, f"{name}: {detail} ({metric})"


def check_gradients(ours: dict[str, Any], stored: dict[str, Tensor], tol: float) -> None:
    """Every stored gradient against ours, each relative to its own largest entry.

    What a softmax or a norm takes away again (a bias of all its scores, the one element of a
    group) has no gradient but rounding: ours must be none too.
    """
    largest = max((_top(gradient.abs()) for gradient in stored.values()), default=0.0)
    for name, expected in stored.items():
        if _top(expected.abs()) < ROUNDING * largest:
            rounding = max(ROUNDING, torch.finfo(ours[name].dtype).eps)
            check(f"grad.{name}", ours[name], expected, rounding * largest, "absolute")
        else:
            check(f"grad.{name}", ours[name], expected, tol)


def _top(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _as_tensor(value: Any) -> Tensor:
    return value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(value)


def _tables(index: dict[str, Any]) -> list[dict[str, Any]]:
    """Tables that stand in the index itself, as cases."""
    return [
        {"name": f"{name}_table", "kind": "table", **index[name]}
        for name in TABLES
        if isinstance(index.get(name), dict)
    ]


def _with_shared_facts(entry: dict[str, Any], index: dict[str, Any]) -> dict[str, Any]:
    """An entry that names a model of its index carries it, so that a runner needs no index."""
    model = entry.get("model")
    models = index.get("models")
    if isinstance(model, str) and isinstance(models, dict) and model in models:
        return {**entry, "model": {"name": model, **models[model]}}
    return entry
