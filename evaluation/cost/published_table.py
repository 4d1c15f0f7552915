"""Check a published cost table row by row: stated figures beside ours, and speeds on a GPU.

The table itself comes from configs/table, as an object with the methods of `CostTable`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from evaluation.cost.peaks import arithmetic_of, device_name
from evaluation.cost.settings import Settings
from evaluation.cost.timing import INFERENCE, Contestant, free_memory, measure_in_turn, speed_of
from evaluation.progress import say, track
from evaluation.results import print_table
from utils.config.build import build
from utils.errors import UserError, as_user_error
from utils.nearest import nearest
from utils.whole_file import write_text

COUNTS = ("auto", "all", "none")
# Nets beyond this take too long on a CPU to run a pass for every row.
CHEAP_GMACS = 500
# 50 runs, the first quarter not timed, as published.
STEPS, WARMUP = 38, 12


class CostTable(Protocol):
    """The interface of a published table, which has its own type of rows."""

    title: str
    protocol: str
    rows: Sequence[Any]
    base: str  # `method` of the rows that the others are held against

    def words(self, row: Any) -> tuple[str, str, str]:
        """Method, model and parameters of a row, to be read."""
        ...

    def image_size(self, row: Any) -> int:
        """Pixels a side."""
        ...

    def cost(self, row: Any, counts: Sequence[float] | None = None) -> Any:
        """Its closed form (`total`, `products`); None where it depends on counts not given."""
        ...

    def net(self, model: str) -> nn.Module:
        """The plain net of that name, in eval mode."""
        ...

    def reduce(self, row: Any, net: nn.Module) -> nn.Module:
        """The net of a row, around the weights of `net`."""
        ...

    def measure(self, row: Any, net: nn.Module, image: Tensor) -> list[float]:
        """The counts that the cost depends on, measured on one image [1 3 H H]."""
        ...


class Line(NamedTuple):
    """The results of one row."""

    row: Any
    cost: Any  # None: it depends on counts that were not taken
    counts: list[float] | None  # taken of random or given weights
    solved: Any = None  # the cost with the count that gives the stated figure
    speeds: Mapping[int, float] = {}  # batch size -> images per second


def measure_table(config: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Print every row of `config["table"]`, stated beside ours; returns the rows as plain data.

    Counts that depend on weights and images are measured on one uniform random image. Speeds need a
    CUDA device and `inference` among the passes. UserError for words that match no row.
    """
    if config["counts"] not in COUNTS:
        raise UserError(f"counts are {', '.join(COUNTS)}, not {config['counts']!r}")
    table: CostTable = build(config["table"])
    rows = _chosen(table, config["rows"])
    timed = settings.device.type == "cuda" and INFERENCE in settings.passes
    lines = []
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        counted = [row for row in own if row.free and _is_counted(table, row, config, settings)]
        net = _net(table, model, settings) if timed or counted else None
        counts = _count(table, counted, net, settings)
        speeds = _speeds(table, own, net, config, settings) if timed and net else {}
        for index, row in enumerate(own):
            found = counts.get(id(row))
            solved = table.cost(row, [row.free.solution]) if row.free else None
            cost = table.cost(row, found)
            lines.append(Line(row, cost, found, solved, speeds.get(index, {})))
        del net
        free_memory()
    _print(table, lines, config)
    _print_speeds(table, lines, settings)
    plain = [_plain(line) for line in lines]
    results = {"table": table.title, "rows": plain}
    if config["json_file"]:
        path = Path(config["json_file"])
        write_text(path, json.dumps(results, indent=2) + "\n")
        say(f"written: {path}")
    return results


def _net(table: CostTable, model: str, settings: Settings) -> nn.Module:
    with as_user_error():  # a file of weights may not fit
        return table.net(model).to(settings.device)


def _chosen(table: CostTable, words: str | None) -> list[Any]:
    """The rows whose method or model, by either of their names, is among the words."""
    if not words:
        return list(table.rows)
    wanted = [word.strip() for word in str(words).split(",") if word.strip()]
    names = {id(row): {row.method, row.model, *table.words(row)[:2]} for row in table.rows}
    known = sorted(set().union(*names.values()))
    for word in wanted:
        if word.lower() not in [name.lower() for name in known]:
            raise UserError(f"no row is of {word!r}{nearest(word, known)} ({', '.join(known)})")
    low = {word.lower() for word in wanted}
    methods = {m.lower() for row in table.rows for m in (row.method, table.words(row)[0])} & low
    models = {m.lower() for row in table.rows for m in (row.model, table.words(row)[1])} & low

    def matches(row: Any) -> bool:
        mine = {name.lower() for name in names[id(row)]}
        return bool(not methods or mine & methods) and bool(not models or mine & models)

    return [row for row in table.rows if matches(row)]


def _is_counted(table: CostTable, row: Any, config: Mapping[str, Any], settings: Settings) -> bool:
    if config["counts"] != "auto" or settings.device.type == "cuda":
        return config["counts"] != "none"
    return table.cost(row, [row.free.solution]).total / 1e9 <= CHEAP_GMACS


def _count(
    table: CostTable, rows: list[Any], net: nn.Module | None, settings: Settings
) -> dict[int, list[float]]:
    """What the cost of each row depends on, by the row's id."""
    if net is None or not rows:
        return {}
    generator = torch.Generator().manual_seed(settings.seed)
    size = table.image_size(rows[0])
    image = torch.rand(1, 3, size, size, generator=generator).to(settings.device)
    label = f"passes of {table.words(rows[0])[1]} that count"
    found = {}
    for row in track(rows, total=len(rows), label=label):
        with torch.inference_mode():
            found[id(row)] = table.measure(row, net, image)
    return found


def _speeds(
    table: CostTable,
    rows: list[Any],
    net: nn.Module,
    config: Mapping[str, Any],
    settings: Settings,
) -> dict[int, dict[int, float]]:
    """Images per second of each row by batch size, all rows of one model in turn."""
    steps = config["steps"] or STEPS
    warmup = WARMUP if config["warmup"] is None else config["warmup"]
    size = table.image_size(rows[0])
    found: dict[int, dict[int, float]] = {index: {} for index in range(len(rows))}
    for batch in dict.fromkeys((1, settings.batch_size)):
        images = torch.rand(batch, 3, size, size, device=settings.device)
        contestants = {
            str(index): Contestant(
                _row_net(table, row, net, settings), images, dtype=settings.dtype
            )
            for index, row in enumerate(rows)
        }
        turns, _ = measure_in_turn(
            contestants,
            INFERENCE,
            steps=steps,
            rounds=min(settings.rounds, steps),
            warmup=warmup,
        )
        for index, own in turns.items():
            found[int(index)][batch] = speed_of(own, batch).images_per_second
    return found


def _row_net(table: CostTable, row: Any, net: nn.Module, settings: Settings) -> nn.Module:
    # Compiled whole and not in place: the rows share their blocks.
    reduced = table.reduce(row, net)
    return cast(nn.Module, torch.compile(reduced)) if settings.compile else reduced


def _print(table: CostTable, lines: list[Line], config: Mapping[str, Any]) -> None:
    columns = ["method", "model", "parameters", "GFLOPs\nstated", "ours", "difference", "products"]
    counted = any(line.row.free for line in lines)
    columns += ["count", "count that gives\nthe stated (1 %)"] if counted else []
    columns += ["top-1\nstated"]
    parts = [table.protocol, "products: convolutions, linear layers without bias, matrix products"]
    if counted:
        given = {k: v for k, v in (config["table"].get("weights") or {}).items() if v}
        weights = f"weights {given}" if given else "random weights"
        parts.append(
            f"count: clusters (mean over blocks) or tokens of one random image, {weights}; * not "
            "taken, so the cost is that at the count which gives the stated figure"
        )
    rows = [_cells(table, line, counted) for line in lines]
    print_table(table.title, columns, rows, protocol="; ".join(parts))
    fixed = [line for line in lines if not line.row.free]
    if fixed:
        worst = max(abs(_difference(line.cost, line.row)) for line in fixed)
        say(f"{len(fixed)} rows of fixed cost: at most {worst:.3f} % from the stated figure")


def _cells(table: CostTable, line: Line, counted: bool) -> list[str | None]:
    row, cost = line.row, line.cost or line.solved
    mark = "" if line.cost else "*"
    cells: list[str | None] = [*table.words(row), f"{row.stated.gflops:g}"]
    cells += [f"{cost.total / 1e9:.2f}{mark}", f"{_difference(cost, row):+.3f} %{mark}"]
    cells += [f"{cost.products / 1e9:.2f}{mark}"]
    if counted:
        mean = None if line.counts is None else sum(line.counts) / len(line.counts)
        cells.append(None if mean is None else f"{mean:.0f}")
        free = row.free
        cells.append(free and f"{free.solution} ({free.least}-{free.most})")
    return [*cells, f"{row.stated.accuracy:g}"]


def _print_speeds(table: CostTable, lines: list[Line], settings: Settings) -> None:
    batches = list(dict.fromkeys(batch for line in lines for batch in line.speeds))
    if not batches:
        return
    columns = ["method", "model", "parameters"]
    for batch in batches:
        columns += [f"images/s\nbatch {batch}", "times\nthe base", "stated", "reached"]
    rows: list[list[str | None]] = []
    for line in lines:
        base = _base_of(table, lines, line)
        cells: list[str | None] = [*table.words(line.row)]
        for place, batch in enumerate(batches):
            cells += _speed_cells(line, base, batch, throughput=place > 0)
        rows.append(cells)
    arithmetic = arithmetic_of(settings.device, settings.dtype)
    protocol = f"{arithmetic}, {settings.mode}, {device_name(settings.device)}; "
    protocol += "rows of a model in turn; stated: of FPS, then of throughput"
    print_table("speed beside the base model", columns, rows, protocol=protocol)


def _speed_cells(
    line: Line, base: Line | None, batch: int, *, throughput: bool
) -> Iterator[str | None]:
    speed = line.speeds.get(batch)
    yield None if speed is None else f"{speed:.1f}"
    reference = base and base.speeds.get(batch)
    if not base or not reference or speed is None:
        yield from (None, None, None)
        return
    stated = [r.stated.throughput if throughput else r.stated.fps for r in (line.row, base.row)]
    ours, theirs = speed / reference, stated[0] / stated[1]
    yield f"{ours:.2f}"
    yield f"{theirs:.2f}"
    yield "yes" if ours >= theirs else "no"


def _base_of(table: CostTable, lines: list[Line], line: Line) -> Line | None:
    base = (table.base, line.row.model)
    return next((other for other in lines if (other.row.method, other.row.model) == base), None)


def _difference(cost: Any, row: Any) -> float:
    """In percent of the stated figure."""
    return 100 * (cost.total / 1e9 / row.stated.gflops - 1)


def _plain(line: Line) -> dict[str, Any]:
    row = line.row
    return {
        "method": row.method,
        "model": row.model,
        "options": dict(row.options),
        "stated": row.stated._asdict(),
        "multiply_adds": line.cost and line.cost.total,
        "products": line.cost and line.cost.products,
        "counts": line.counts,
        "count_that_gives_the_stated": row.free and row.free._asdict(),
        "multiply_adds_at_that_count": line.solved and line.solved.total,
        "images_per_second": {str(batch): speed for batch, speed in line.speeds.items()},
    }
