"""Write the figures of a probe, with their protocol, into results.json."""

import json
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from textwrap import shorten
from typing import Any

from utils.folders import make_folder
from utils.run_files import RESULTS
from utils.whole_file import write_text

# Not settings: a training's later figures replace its earlier ones, and they are the same on any
# number of processes.
UNTOLD = ("step", "world_size")


def write_results(
    output_dir: Path, probe: str, *, protocol: Mapping[str, object], figures: Mapping[str, object]
) -> Path:
    """Write one probe's figures into `output_dir`/results.json, beside those of other probes.

    Says so where they replace figures of another net, or of other settings by their protocols.
    """
    path = Path(output_dir) / RESULTS
    make_folder(path.parent)
    results = _read(path) if path.exists() else {}
    if before := _replaced(results.get(probe), protocol):
        print(f"{path}: replaces the {probe} results of {before}", flush=True)
    results[probe] = {"protocol": dict(protocol), "figures": dict(figures)}
    write_text(path, json.dumps(results, indent=2) + "\n")
    return path


def _read(path: Path) -> dict[str, Any]:
    """Read the results of all probes; a damaged file is renamed and kept, not overwritten."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        names = (path.with_suffix(f".damaged{number or ''}") for number in count())
        aside = path.replace(next(name for name in names if not name.exists()))
        print(f"{path} is damaged: set aside as {aside.name}", flush=True)
        return {}


def _replaced(entry: Any, protocol: Mapping[str, object]) -> str:
    """What the figures of `entry` belong to if that is not what `protocol` says; else ""."""
    before = entry.get("protocol") if isinstance(entry, Mapping) else None
    if not isinstance(before, Mapping):
        return ""
    if (net := _net_of(before)) and net != _net_of(protocol):
        return net
    # As they are read again; a value without a form in JSON is an error of the writing below.
    now = json.loads(json.dumps(dict(protocol), default=str))
    # A key that one version of the code writes and another does not tells of no other setting.
    keys = [key for key in now if key in before and key not in UNTOLD]
    return ", ".join(
        f"{key} = {shorten(str(before[key]), 60)}" for key in keys if before[key] != now[key]
    )


def _net_of(protocol: Mapping[str, Any]) -> str:
    """The net and weights of a protocol; "" if it does not say them."""
    net = protocol.get("backbone")
    if isinstance(net, Mapping):  # a node of a config
        net = net.get("model_name") or str(net.get("_target_")).split(".")[-1]
    return f"{net}, weights: {protocol.get('weights')}" if net else ""
