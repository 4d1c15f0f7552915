"""summary.json of a run, the table printed at its end, and the history of earlier attempts."""

import json
import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.table import Table

from utils import distributed
from utils.console import Lines
from utils.endings import MAX_STEPS
from utils.metrics_file import read_metrics
from utils.progress_line import first_of_each
from utils.run_files import CONFIG, EXPORTED, METRICS, SUMMARY
from utils.whole_file import write_text


class History(NamedTuple):
    """What a run folder records up to the step that a run resumes from.

    `summary`: of an attempt that ended in order at that step, else empty. `logged`: the values of
    the step in metrics.jsonl. `skipped`: number of steps that were not finite; `unread`: of images
    that could not be read. `judged`: probes whose figures, of the same settings and data, are in
    `summary`: they need not run again.
    """

    summary: dict[str, Any]
    logged: dict[str, float]
    skipped: int
    unread: int
    judged: set[str]
    exported: bool


def read_history(
    folder: Path, step: int, config: Mapping[str, Any], schedules: Collection[str]
) -> History:
    """The history of a run folder; `schedules` are the keys of metrics.jsonl that may be NaN."""
    summary = _read(folder / SUMMARY, json.loads)
    summary = summary if summary.get("step") == step else {}
    logged: dict[str, float] = {}
    skipped, unread = 0, 0
    for line in read_metrics(folder / METRICS):
        if line["step"] == step:
            logged |= line
        if line["step"] <= step:
            unread = int(line.get("unread_images", unread))
        if "loss" in line and line["step"] <= step:  # one line per step has it
            values = [value for key, value in line.items() if key not in schedules]
            skipped += not all(map(math.isfinite, values))
    judged = _judged(folder, config, summary)
    return History(summary, logged, skipped, unread, judged, (folder / EXPORTED).is_file())


def how_it_ended(step: int, total: int, stopped_by: str = MAX_STEPS) -> dict[str, Any]:
    """`finished` (all steps of the recipe are made) and `stopped_by` of a summary."""
    finished = step >= total
    return {"finished": finished, "stopped_by": "" if finished else stopped_by}


def write_summary(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Write summary.json and print the table, on rank 0; returns the summary."""
    if not distributed.is_main():
        return summary
    write_text(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
    table = Table(title=f"{summary['name']}: {folder}", show_header=False)
    shown, more = first_of_each(summary)
    for key in shown:
        value = summary[key]
        if key not in ("name", "output_dir") and value != "":
            table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    if more:
        table.add_row("", f"{more} more in {SUMMARY}")
    Lines().print(table)
    return summary


def _judged(folder: Path, config: Mapping[str, Any], summary: Mapping[str, Any]) -> set[str]:
    # With the same settings, on the same images.
    earlier = _read(folder / CONFIG, yaml.safe_load)
    now = json.loads(json.dumps(config, default=str))
    if not earlier or earlier.get("data") != now.get("data"):
        return set()
    before, asked = (one.get("probes") or {} for one in (earlier, now))
    names = {key.partition("/")[0] for key in summary if "/" in key}
    return {name for name in names if before.get(name) == asked.get(name)}


def _read(path: Path, parse: Any) -> dict[str, Any]:
    with suppress(OSError, ValueError, yaml.YAMLError):
        content = parse(path.read_text())
        if isinstance(content, dict):
            return content
    return {}
