"""Write the figures of a probe, with their protocol, into results.json."""

import json
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from utils.folders import make_folder
from utils.run_files import RESULTS
from utils.whole_file import write_text


def write_results(
    output_dir: Path, probe: str, *, protocol: Mapping[str, object], figures: Mapping[str, object]
) -> Path:
    """Write one probe's figures into `output_dir`/results.json, beside those of other probes."""
    path = Path(output_dir) / RESULTS
    make_folder(path.parent)
    results = _read(path) if path.exists() else {}
    if (before := _net_of(results.get(probe))) and before != _net_of({"protocol": protocol}):
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


def _net_of(entry: Any) -> str:
    """The net and weights that a probe's results belong to; "" if no protocol says it."""
    protocol = entry.get("protocol") if isinstance(entry, Mapping) else None
    if not isinstance(protocol, Mapping):
        return ""
    net = protocol.get("backbone")
    if isinstance(net, Mapping):  # a node of a config
        net = net.get("model_name") or str(net.get("_target_")).split(".")[-1]
    return f"{net}, weights: {protocol.get('weights')}" if net else ""
