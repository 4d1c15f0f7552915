"""Lay out one probe's figures as tables."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from utils.symmetry import SYMMETRIES

# "knn10_top1", "('full', 10) Top 1", "rrr_loss": what was judged, and the kind of figure.
KIND = re.compile(
    r"^(.*?)[_ ]?(top[15]|Top [15]|acc[15]|image_loss|loss|changed|mIoU|miou|accuracy)$"
)
# DINOv2 names a figure of kNN by its group of training images, "full" or "5 per class", and k.
NEIGHBOURS = re.compile(r"^\('(.+)', (\d+)\)$")
# The options of the accuracy probe beside the symmetries; its other figures are of upright images.
VIEWS = {"rot", "flop", "rot_flop", *SYMMETRIES}

Row = tuple[str, list[Any]]  # label and values


class Table(NamedTuple):
    """Rows of figures; a column may have no heading."""

    title: str  # empty for the figures that stand alone
    columns: list[str]
    rows: list[Row]


def tables(probe: str, figures: Mapping[str, Any]) -> list[Table]:
    """The single figures in one table, and a table of its own for each figure that is one itself.

    Such are the heads of a linear probe, or errors by layer. Where each net has its own mapping,
    nets stand side by side; else single figures are sorted by kinds.
    """
    if figures and all(isinstance(value, Mapping) for value in figures.values()):
        found = list(_of_nets(figures))
    else:
        inner = {key: rows for key, value in figures.items() if (rows := _rows_in(value))}
        single = flat({key: value for key, value in figures.items() if key not in inner})
        found = [_by_kinds(probe, single), *(_whole(key, inner[key]) for key in inner)]
    return [table for table in found if table.columns and table.rows]


def flat(node: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Single values by their dotted names."""
    found: list[tuple[str, Any]] = []
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            found += flat(value, f"{prefix}{key}.")
        elif str(key) != "_target_":
            found.append((f"{prefix}{key}", value))
    return found


def _rows_in(value: Any) -> dict[str, Mapping[str, Any]]:
    """The rows of a figure that is a table: mappings of single values, by name or in a list."""
    if isinstance(value, list | tuple):
        value = {str(number): row for number, row in enumerate(value, 1)}
    if not isinstance(value, Mapping):
        return {}
    rows = {str(label): row for label, row in value.items() if isinstance(row, Mapping)}
    nested = any(isinstance(cell, Mapping) for row in rows.values() for cell in row.values())
    return {} if nested or len(rows) < len(value) else rows


def _whole(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    cells = [(label, [row.get(column) for column in columns]) for label, row in rows.items()]
    return Table(title, columns, cells)


def _of_nets(nets: Mapping[str, Mapping[str, Any]]) -> Iterator[Table]:
    single = {
        name: {key: value for key, value in part.items() if not _has_parts(value)}
        for name, part in nets.items()
    }
    yield _by_nets("", single)
    parts = (key for part in nets.values() for key, value in part.items() if _has_parts(value))
    for key in dict.fromkeys(parts):
        rest = {}
        for name, part in nets.items():
            if rows := _rows_in(part.get(key)):
                yield _whole(f"{name}: {key}" if len(nets) > 1 else key, rows)
            elif isinstance(part.get(key), Mapping) and part[key]:
                rest[name] = dict(flat(part[key]))
        yield _by_nets(key, rest)


def _has_parts(value: Any) -> bool:
    return isinstance(value, Mapping) or bool(_rows_in(value))


def _by_nets(title: str, found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Figures of each net, whichever there are more of downwards: nets or figures."""
    table = _whole(title, found)
    if len(table.rows) > len(table.columns):
        # A heading is broken between words.
        return table._replace(columns=[name.replace("_", " ") for name in table.columns])
    turned = [
        (column, [values[index] for _, values in table.rows])
        for index, column in enumerate(table.columns)
    ]
    return Table(title, list(found), turned)


def _by_kinds(probe: str, found: Sequence[tuple[str, Any]]) -> Table:
    split = [
        match and (_in_words(match[1]), match[2]) for match in (KIND.match(key) for key, _ in found)
    ]
    kinds = list(dict.fromkeys(pair[1] for pair in split if pair))
    if len(kinds) < 2:
        return Table("", [""], [(key, [value]) for key, value in found])
    upright = "upright" if any(pair and pair[0] in VIEWS for pair in split) else probe
    rows: dict[str, dict[str, Any]] = {}
    rest: list[tuple[str, Any]] = []
    for pair, (key, value) in zip(split, found, strict=True):
        if pair:
            rows.setdefault(pair[0] or upright, {})[pair[1]] = value
        else:
            rest.append((key, value))
    lines = [(row, [rows[row].get(kind, "") for kind in kinds]) for row in rows]
    if not rest:
        return Table("", kinds, lines)
    # What is of none of these kinds has a column without a heading.
    lines = [(row, [*values, ""]) for row, values in lines]
    lines += [(key, [""] * len(kinds) + [value]) for key, value in rest]
    return Table("", [*kinds, ""], lines)


def _in_words(judged: str) -> str:
    """The label of what was judged, that of kNN as the probe's own names of its figures begin."""
    if match := NEIGHBOURS.match(judged):
        group = "" if match[1] == "full" else f"_{match[1].replace(' ', '_')}"
        return f"knn{match[2]}{group}"
    return judged
