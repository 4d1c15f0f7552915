"""Make tables of the figures of many measurements, from the files that their commands wrote."""

import json
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from evaluation.cost.peaks import known_peak
from evaluation.cost.scaling import work_of
from evaluation.cost.speed_list import Measurement
from evaluation.cost.table import OUT_OF_MEMORY, digits, times_of
from evaluation.results import print_table
from utils.errors import UserError
from utils.metrics_file import read_metrics
from utils.run_files import CONFIG, METRICS
from utils.whole_file import write_text

UNSETTLED = 2  # windows of a training in which it compiles and its workers start
NETS = ["net", "pass", "mode", "images/s", "times the twin's", "MFU %", "peak MiB"]
BLOCKS = ["net", "block", "mode", "forward us", "times", "forward and backward us", "times"]
PLACES = {"worker": "one core", "device": "the device"}
DATA = ["pipeline", "by", "on", "images/s"]


class Table(NamedTuple):
    """Rows of text under columns; None where there is no figure."""

    title: str
    columns: list[str]
    rows: list[list[str | None]]


class Training(NamedTuple):
    """Images per second of a training, window by window, and its share of the device's peak."""

    net: str
    mode: str
    rates: list[float]
    mfu: float | None
    peak_mib: float | None

    @property
    def median(self) -> float:
        """Images per second."""
        return statistics.median(self.rates)


def tables_of(
    folder: Path, measurements: Sequence[Measurement], facts: Mapping[str, Any]
) -> list[Table]:
    """Tables of whole nets and trainings, blocks and the data path; none without files for it."""
    files = {entry.name: _load(folder / f"{entry.name}.json") for entry in measurements}
    peaks = {
        found["protocol"]["arithmetic"]: found["protocol"]["peak_flops"]
        for found in files.values()
        if _is_comparison(found)
    }
    trainings = {
        entry.name: training
        for entry in measurements
        if (training := _training(folder / entry.name, facts, peaks))
    }
    nets, blocks, data = [], [], []
    for entry in measurements:
        found = files[entry.name]
        nets += _rows_of_nets(found)
        blocks += _rows_of_blocks(found)
        data += _rows_of_data(found)
        if training := trainings.get(entry.name):
            nets.append(_row_of_training(training, trainings.get(entry.twin or "")))
    made = [
        Table("speed of whole nets", NETS, nets),
        Table("blocks", BLOCKS, blocks),
        Table("data path", DATA, data),
    ]
    return [table for table in made if table.rows]


def print_tables(tables: Sequence[Table], protocol: str) -> None:
    """Print them one after the other."""
    for table in tables:
        print_table(table.title, table.columns, table.rows, protocol=protocol)


def write_markdown(
    path: Path, tables: Sequence[Table], protocol: str, commands: Sequence[str]
) -> Path:
    """Write the tables as a section of a page, below the machine and the commands."""
    parts = [f"{protocol}.", "\n".join(["```bash", *commands, "```"])]
    for table in tables:
        lines: list[Sequence[str | None]] = [table.columns, ["---"] * len(table.columns)]
        lines += table.rows
        parts.append(f"{table.title[0].upper()}{table.title[1:]}:")
        parts.append("\n".join(f"| {' | '.join(c or '-' for c in line)} |" for line in lines))
    if any(table.columns == NETS for table in tables):
        parts.append(
            "Times the twin's: the median of the rounds (least-greatest). DINOv2: the median of a "
            f"training's windows after the first {UNSETTLED} (least-greatest), by the twin's; MFU "
            "of the backbones' operations."
        )
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def _load(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # there is none, or it was cut off
        return {}
    return found if isinstance(found, dict) and "protocol" in found else {}


def _is_comparison(found: Mapping[str, Any]) -> bool:
    """Whether experiments/complexity.py has written it, of nets and not of a published table."""
    return "models" in found and "passes" in found["protocol"]


def _rows_of_nets(found: Mapping[str, Any]) -> list[list[str | None]]:
    """Of what experiments/complexity.py writes."""
    rows: list[list[str | None]] = []
    if not _is_comparison(found):
        return rows
    protocol = found["protocol"]
    mode = f"{protocol['arithmetic']}, {protocol['mode']}, batch {protocol['batch_size']}"
    for name, net in found["models"].items():
        for kind in protocol["passes"]:
            if kind in net["out_of_memory"]:
                rows.append([name, kind, mode, OUT_OF_MEMORY, None, None, None])
            elif kind in net["passes"]:
                speed = net["passes"][kind]
                ratio, peak = speed["times_the_twin"], speed["peak_mib"]
                figures = [digits(speed["images_per_second"]), times_of(ratio) if ratio else None]
                figures += [_percent(speed["mfu"]), None if peak is None else f"{peak:.0f}"]
                rows.append([name, kind, mode, *figures])
    return rows


def _rows_of_blocks(found: Mapping[str, Any]) -> list[list[str | None]]:
    """Of what `experiments/anatomy.py times` writes."""
    rows: dict[tuple[str, str, str], dict[str, list[str | None]]] = {}
    for name, times in found.get("blocks", {}).items():
        for time in times:
            ratio = time["times_the_last"]
            cells = [f"{time['microseconds']:.0f}", None if ratio is None else f"{ratio:.2f}"]
            rows.setdefault((name, time["block"], time["mode"]), {})[time["pass"]] = cells
    return [
        [*key, *cells.get("forward", [None] * 2), *cells.get("forward and backward", [None] * 2)]
        for key, cells in rows.items()
    ]


def _rows_of_data(found: Mapping[str, Any]) -> list[list[str | None]]:
    """Of what experiments/bench_data.py writes."""
    rows: list[list[str | None]] = []
    for name, rate in found.get("figures", {}).items():
        pipeline, kind, place = name.rsplit("/", 2)
        rows.append([pipeline, kind, PLACES.get(place, place), digits(rate)])
    return rows


def _training(
    folder: Path, facts: Mapping[str, Any], peaks: Mapping[str, float]
) -> Training | None:
    """A run folder's rates once it has settled; None where there are none."""
    try:
        lines = read_metrics(folder / METRICS)
        config = yaml.safe_load((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    windows = [line for line in lines if "images_per_second" in line][UNSETTLED:]
    if not windows:
        return None
    rates = [line["images_per_second"] for line in windows]
    memory = [1024 * line["memory_gb"] for line in windows if "memory_gb" in line]
    precision = config["training"]["precision"]
    if precision == "auto":
        precision = facts["auto_precision"]
    peak = known_peak(facts["device"], precision)
    flops, operations = peak.flops if peak else peaks.get(precision), _operations(folder)
    mfu = statistics.median(rates) * operations / flops if flops and operations else None
    words = [precision, "compiled" if config["training"]["compile"] else "eager"]
    words.append(f"batch {config['recipe']['batch_size_per_gpu']}")
    name = str(config["backbone"]["_target_"]).rpartition(".")[2]
    return Training(name, ", ".join(words), rates, mfu, max(memory, default=None))


@cache
def _operations(folder: Path) -> float | None:
    """Floating-point operations of a DINOv2 step for an image; None for another recipe."""
    try:
        return work_of(str(folder / CONFIG))[0].operations_per_image
    except UserError:
        return None


def _row_of_training(own: Training, twin: Training | None) -> list[str | None]:
    rate = f"{digits(own.median)} ({digits(min(own.rates))}-{digits(max(own.rates))})"
    ratio = f"{own.median / twin.median:.2f}" if twin else None
    peak = None if own.peak_mib is None else f"{own.peak_mib:.0f}"
    return [own.net, "DINOv2 step", own.mode, rate, ratio, _percent(own.mfu), peak]


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f}"
