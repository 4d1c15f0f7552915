"""The table and the JSON file of a comparison of costs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.cost.counting import Cost
from evaluation.cost.peaks import Peak
from evaluation.cost.settings import Settings
from evaluation.cost.timing import INFERENCE, Ratio, Speed
from evaluation.results import print_table, write_measured
from utils.flops import Operations

COUNTED = "forward"
OUT_OF_MEMORY = "out of memory"


@dataclass
class Result:
    """The results of one net; speeds and ratios by pass."""

    name: str
    twin: str | None  # the plain net that it is compared with
    cost: Cost
    size: int  # pixels a side
    keywords: Mapping[str, Any] = field(default_factory=dict)  # beside those of the named config
    speeds: dict[str, Speed] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)  # passes that ran out of memory
    operators: Operations | None = None  # as they run on the device
    fvcore: dict[str, Any] | None = None

    def operations(self, kind: str) -> int:
        """Floating-point operations of a pass for one image."""
        done = self.cost.operations
        return done.forward if kind in (INFERENCE, COUNTED) else done.total

    def use(self, kind: str, peak: Peak) -> float | None:
        """Share of the device's peak (MFU): the model's operations per second over the peak."""
        speed = self.speeds.get(kind)
        return speed and speed.images_per_second * self.operations(kind) / peak.flops


def print_results(
    results: list[Result], settings: Settings, protocol: Mapping[str, Any], peak: Peak | None
) -> None:
    """Print one row per net and pass."""
    kinds = settings.passes or (COUNTED,)
    columns = ["model", "parameters\n10^6"]
    columns += ["pixels\na side"] if protocol["size"] is None else []
    columns += ["pass", "multiply-adds\n10^9"]
    columns += ["images/s", "times\nthe twin's", "MFU\n%", "peak\nMiB"] if settings.passes else []
    columns += ["operators"] if any(result.operators for result in results) else []
    columns += ["fvcore\n10^9"] if any(result.fvcore for result in results) else []
    rows = [
        _row(result, kind, kind == kinds[0], peak, columns) for result in results for kind in kinds
    ]
    print_table("cost of a net", columns, rows, protocol=_protocol_in_words(protocol, peak))


def in_words(result: Result, kind: str) -> str:
    """One line about a pass of a net, printed as soon as it is measured."""
    if kind not in result.speeds:
        return f"{result.name}: {kind}, {OUT_OF_MEMORY}"
    rate, ratio = digits(result.speeds[kind].images_per_second), result.ratios.get(kind)
    beside = f", {times_of(ratio._asdict())} times the twin's" if ratio else ""
    return f"{result.name}: {kind}, {rate} images/s{beside}"


def write_json(
    path: Path, results: Mapping[str, Result], protocol: Mapping[str, Any], peak: Peak | None
) -> Path:
    """Write all results of every net, with the protocol."""
    models = {name: _plain(result, peak) for name, result in results.items()}
    return write_measured(path, dict(protocol), models=models)


def _row(
    result: Result, kind: str, first: bool, peak: Peak | None, columns: list[str]
) -> list[str | None]:
    speed, ratio = result.speeds.get(kind), result.ratios.get(kind)
    lost = OUT_OF_MEMORY if kind in result.lost else None
    use = result.use(kind, peak) if peak else None
    cells: dict[str, str | None] = {
        "model": _label(result) if first else "",
        "parameters\n10^6": f"{result.cost.parameters / 1e6:.2f}" if first else "",
        "pixels\na side": str(result.size) if first else "",
        "pass": kind,
        "multiply-adds\n10^9": f"{result.operations(kind) / 2e9:.2f}",
        "images/s": lost or (speed and digits(speed.images_per_second)),
        "times\nthe twin's": ratio and times_of(ratio._asdict()),
        "MFU\n%": None if use is None else f"{100 * use:.1f}",
        "peak\nMiB": None if speed is None or speed.peak_mib is None else f"{speed.peak_mib:.0f}",
        "operators": _operators(result, kind),
        "fvcore\n10^9": f"{result.fvcore['total'] / 1e9:.2f}" if result.fvcore and first else "",
    }
    return [cells[column] for column in columns]


def _label(result: Result) -> str:
    given = [f"{key}={value}" for key, value in result.keywords.items()]
    return "\n  ".join([result.name, *given])


def _operators(result: Result, kind: str) -> str | None:
    if result.operators is None:
        return None
    count, back = result.operators.forward_calls, result.operators.backward_calls
    return str(count if kind in (INFERENCE, COUNTED) else count + back)


def digits(rate: float) -> str:
    """A rate with three digits, or all of those before the point."""
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 10 else f"{rate:.2f}"


def times_of(ratio: Mapping[str, float]) -> str:
    """A ratio's median with its smallest and largest round."""
    return f"{ratio['median']:.2f} ({ratio['least']:.2f}-{ratio['greatest']:.2f})"


def size_in_words(protocol: Mapping[str, Any]) -> str:
    """The images' size, where all nets were given the same."""
    size = protocol["size"]
    return f"{size} x {size} pixels" if size else "each net at its own size"


def _protocol_in_words(protocol: Mapping[str, Any], peak: Peak | None) -> str:
    parts = [size_in_words(protocol), "multiply-adds of one image"]
    if peak:
        parts += [
            f"batch {protocol['batch_size']}, {protocol['arithmetic']}, {protocol['mode']}",
            f"{protocol['steps']} timed steps in {protocol['rounds']} rounds, nets in turn",
            "times the twin's: median of the rounds (least-greatest)",
            f"training step: {protocol['training_step']}",
            f"MFU: of {peak.flops / 1e12:.3g} TFLOP/s ({peak.source})",
            f"{protocol['device']}, {protocol['threads']} threads",
        ]
    return "; ".join([*parts, f"torch {protocol['torch']}", protocol["date"]])


def _plain(result: Result, peak: Peak | None) -> dict[str, Any]:
    cost = result.cost
    return {
        "twin": result.twin,
        "size": result.size,
        "keywords": dict(result.keywords),
        "parameters": cost.parameters,
        "trainable_parameters": cost.trainable,
        "multiply_adds": cost.multiply_adds,
        "training_multiply_adds": cost.training_multiply_adds,
        "fvcore": result.fvcore,
        "operators": result.operators and result.operators._asdict(),
        "out_of_memory": result.lost,
        "passes": {
            kind: {
                **speed._asdict(),
                "mfu": result.use(kind, peak) if peak else None,
                "times_the_twin": kind in result.ratios and result.ratios[kind]._asdict() or None,
            }
            for kind, speed in result.speeds.items()
        },
    }
