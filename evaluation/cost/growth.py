"""Measure how time and memory grow with resolution, batch and depth, for octic and plain nets.

One of the three varies, the others stay at the values of `Point()`. Nets take turns, as in
`evaluation.cost.timing`. Memory on CUDA is the measured peak; elsewhere it is the count of bytes
kept for the backward pass.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from evaluation.cost.blocks import kept_bytes
from evaluation.cost.models import find_backbone, make_net
from evaluation.cost.peaks import device_name, has_bfloat16
from evaluation.cost.timing import (
    MIB,
    PASSES,
    TRAINING,
    Contestant,
    free_memory,
    measure_in_turn,
    speed_of,
)
from evaluation.progress import say
from evaluation.results import print_table, write_measured
from utils.errors import UserError


class Point(NamedTuple):
    """Where a net is measured; depth 0 is the net's own."""

    size: int = 224
    batch: int = 1
    depth: int = 0


def measure(
    octic: str,
    plain: str,
    *,
    varied: Mapping[str, Sequence[int]],
    device: str = "cpu",
    base: Point | None = None,
    steps: int = 3,
) -> Iterator[list[dict[str, Any]]]:
    """Of each point, measured as it is asked for, the rows of both nets.

    A row is {net, varied, size, batch, depth, seconds of each pass, mib}; the net's own depth is 0.
    Raises UserError for a size or depth that the nets do not take.
    """
    chosen, start = torch.device(device), base or Point()
    for name, values in varied.items():
        for value in values:
            point = start._replace(**{name: value})
            say(f"{name} {value}")
            try:
                found = _at(point, (octic, plain), chosen, steps)
            except ValueError as error:
                raise UserError(f"{name} {value}: {error}") from error
            yield [{"varied": name, **point._asdict(), **row} for row in found]


def _at(
    point: Point, names: Sequence[str], device: torch.device, steps: int
) -> list[dict[str, Any]]:
    keywords = {"depth": point.depth} if point.depth else {}
    nets = {}
    images = torch.randn(point.batch, 3, point.size, point.size, device=device)
    half = torch.bfloat16 if device.type == "cuda" and has_bfloat16(device) else None
    for name in names:
        node = find_backbone(name, size=point.size, keywords=keywords)
        nets[name] = Contestant(make_net(name, node, "cpu", seed=0).to(device), images, dtype=half)
    rows: dict[str, dict[str, Any]] = {name: {"net": name} for name in names}
    for kind in PASSES:
        turns, _ = measure_in_turn(nets, kind, steps=steps, rounds=steps, warmup=1)
        for name, own in turns.items():
            speed = speed_of(own, point.batch)
            rows[name][kind] = point.batch / speed.images_per_second
            if kind == TRAINING:
                rows[name]["mib"] = speed.peak_mib or kept_bytes(nets[name].net, images) / MIB
    nets.clear()
    free_memory()
    return list(rows.values())


def draw(rows: list[dict[str, Any]], path: Path) -> Path:
    """A row of axes for each pass and for memory, a column for each thing varied."""
    kinds = [*PASSES, "mib"]
    varied = list(dict.fromkeys(row["varied"] for row in rows))
    figure = Figure(figsize=(4 * len(varied), 8), layout="constrained")
    axes = figure.subplots(len(kinds), len(varied), squeeze=False)
    for column, name in enumerate(varied):
        for line, kind in enumerate(kinds):
            axis = axes[line][column]
            for net in dict.fromkeys(row["net"] for row in rows):
                own = [r for r in rows if (r["net"], r["varied"]) == (net, name) and kind in r]
                axis.plot([r[name] for r in own], [r[kind] for r in own], "o-", label=net)
            axis.set(xscale="log", yscale="log")
            axis.set_xticks([r[name] for r in own], [str(r[name]) for r in own])
            # Of x alone: values within one decade have no other ticks than the minor ones of y.
            axis.set_xticks([], minor=True)
            axis.set_ylabel("memory (MiB)" if kind == "mib" else f"{kind} (s)")
            axis.grid(alpha=0.3)
        axes[-1][column].set_xlabel({"size": "pixels a side"}.get(name, name))
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=150)
    return path


def show(
    octic: str,
    plain: str,
    *,
    varied: Mapping[str, Sequence[int]],
    device: str,
    base: Point,
    steps: int,
    json_file: Path | None,
    picture_file: Path | None,
) -> None:
    """Measure, print, and write the files asked for; UserError for a net beside itself.

    json_file is written after every point; after an interrupt or a point that the nets do not take,
    the table and the files hold the points measured so far.
    """
    if octic == plain:
        raise UserError(f"{octic} is to be measured beside another network, not beside itself")
    fixed = f"else {base.size} pixels, batch {base.batch}, depth {base.depth or 'own'}"
    where = f"{device_name(torch.device(device))}, {torch.get_num_threads()} threads"
    told = "peak" if torch.device(device).type == "cuda" else "kept for the backward pass"
    protocol = f"{octic} and {plain} in turn; {fixed}; {where}; memory: {told}"
    rows: list[dict[str, Any]] = []
    try:
        for found in measure(octic, plain, varied=varied, device=device, base=base, steps=steps):
            rows += found
            if json_file:
                write_measured(json_file, protocol, rows=rows)
    finally:
        if rows:
            _print(rows, protocol)
            if json_file:
                say(f"written: {json_file}")
            if picture_file:
                say(f"picture: {draw(rows, picture_file)}")


def _print(rows: list[dict[str, Any]], protocol: str) -> None:
    cells = []
    for own, twin in zip(rows[::2], rows[1::2], strict=True):
        times = [[f"{row.get(kind, float('nan')):.3g}" for row in (own, twin)] for kind in PASSES]
        ratios = [f"{twin[k] / own[k]:.2f}" if k in own and k in twin else None for k in PASSES]
        memory = [f"{row.get('mib', float('nan')):.0f}" for row in (own, twin)]
        name = own["varied"]
        cells.append([f"{name} {own[name]}", *times[0], ratios[0], *times[1], ratios[1], *memory])
    columns = ["", "inference\noctic s", "plain s", "times", "training step\noctic s", "plain s"]
    columns += ["times", "memory\noctic MiB", "plain MiB"]
    print_table("growth of cost", columns, cells, protocol=f"{protocol}; torch {torch.__version__}")
