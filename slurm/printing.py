"""Tables of the points of a sweep, before and after."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from slurm import runs
from slurm.jobs import chosen_figures
from slurm.record import STOPPED
from slurm.task import Task

if TYPE_CHECKING:
    from rich.table import Table


def show_points(tasks: Sequence[Task], jobs: Sequence[str] = ()) -> None:
    """Print each point with its job (if it has one), values and run folder."""
    keys = _keys(tasks)
    table = _table(["job"] if jobs else [], keys, ["run folder"])
    for index, task in enumerate(tasks):
        table.add_row(*jobs[index : index + 1], *_values(task, keys), str(task.folder))
    _print(table)


def show_outcomes(codes: Sequence[tuple[Task, int | None]]) -> None:
    """Print each point with its outcome; an exit code of None means it was not started."""
    keys = _keys([task for task, _ in codes])
    table = _table([], keys, ["outcome", "last figures", "run folder"])
    for task, code in codes:
        run = runs.describe(task.folder)
        outcome = "succeeded" if code == 0 else "not started"
        if code:
            why = run.refusal or run.why
            word = "interrupted" if code in STOPPED else "failed"
            outcome = f"{word}, code {code}{f': {why}' if why else ''}"
        figures = "  ".join(f"{k} {v:.4g}" for k, v in chosen_figures(run).items())
        table.add_row(*_values(task, keys), outcome, figures, str(task.folder))
    _print(table)


def _keys(tasks: Sequence[Task]) -> list[str]:
    return list(dict.fromkeys(key for task in tasks for key in task.values)) or ["name"]


def _values(task: Task, keys: list[str]) -> list[str]:
    if task.values:
        return [task.values.get(key, "") for key in keys]
    return [task.command or str(task.config["name"]), *[""] * (len(keys) - 1)]


def _table(*columns: list[str]) -> "Table":
    from rich.table import Table

    table = Table()
    for name in (name for part in columns for name in part):
        table.add_column(name, overflow="fold")
    return table


def _print(table: "Table") -> None:
    from rich.console import Console

    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=160)
    console.print(table, markup=False)
