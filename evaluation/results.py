"""Print results as a table with their protocol; write measurements, and DINOv2's lines."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from utils.console import may_be_lost
from utils.folders import make_folder
from utils.whole_file import write_text


def write_measured(path: Path, protocol: object, **found: object) -> Path:
    """Write what was measured, by its name, with the protocol, as the one JSON of a file."""
    write_text(path, json.dumps({"protocol": protocol, **found}, indent=2) + "\n")
    return path


def append_lines(path: Path, figures: Mapping[str, object]) -> None:
    """Append one JSON object per figure and line, as DINOv2's evaluations write their files."""
    make_folder(path.parent)
    with path.open("a") as file:
        for name, value in figures.items():
            file.write(json.dumps({name: value}) + "\n")


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, protocol: str
) -> None:
    """Print a table of results and the protocol below it; the first column holds the labels."""
    table = Table()
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    # A log file has no width, so rich would fold the table at 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    with may_be_lost():
        print(title)
        console.print(table)
        print(f"protocol: {protocol}", flush=True)


def print_figures(title: str, probe: str, figures: Mapping[str, float], *, protocol: str) -> None:
    """Print a probe's figures: top-1 and top-5 side by side, one row per other figure."""
    tops: list[tuple[object, ...]] = []
    others: list[tuple[object, ...]] = []
    for key, value in figures.items():
        stem, _, top = key.rpartition("_top")
        if top == "1":
            tops.append((stem, value, figures.get(f"{stem}_top5")))
        elif not (top == "5" and f"{stem}_top1" in figures):
            others.append((key, _figure(value)))
    columns: tuple[str, ...] = (probe, "figure")
    if tops:
        # Others, such as the C of a regression, are no top-1.
        columns = (probe, "top-1 %", "top-5 %", *(["figure"] if others else []))
        tops = [(*row, *([""] if others else [])) for row in tops]
        others = [(key, "", "", value) for key, value in others]
    print_table(title, columns, [*tops, *others], protocol=protocol)


def _figure(value: float) -> object:
    """A small one with three digits: two behind the point would make 1e-06 of a C a 0.00."""
    return f"{value:.3g}" if 0 < abs(value) < 0.1 else value


def in_words(protocol: Mapping[str, object]) -> str:
    """The most important parts of a protocol, as one line.

    A protocol without any of these keys, as of a user's own probe, is shown whole.
    """
    keys = ("feature", "classifier", "vote", "transform")
    known = [str(protocol[key]) for key in keys if protocol.get(key)]
    return "; ".join(known or [f"{key}: {value}" for key, value in protocol.items()])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
