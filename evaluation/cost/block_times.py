"""Time one block on a CUDA device, eager and compiled, and its kernels.

Each pass is captured as a CUDA graph and replayed, so that the time is the device's, without
launches by the host; a block is called as its net calls it. For whole nets see
`experiments/complexity.py`.
"""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evaluation.cost.blocks import kinds_of, shape_of
from evaluation.cost.graphs import record
from evaluation.cost.models import find_backbone, make_net
from evaluation.cost.peaks import device_name
from evaluation.progress import say
from evaluation.results import print_table, write_measured
from utils.errors import UserError
from utils.parallel import allow_variants
from vit.block import terms_of

MODES = ("eager", "compiled")
PASSES = ("forward", "forward and backward")
REPLAYS = 30
LISTED = 25  # kernels of a pass, the longest


class Kernel(NamedTuple):
    """The time of all launches of a kernel in a pass, in microseconds."""

    name: str
    launches: int
    microseconds: float


class BlockTime(NamedTuple):
    """A pass of a block: the median of its replays in microseconds, and its kernels."""

    microseconds: float
    kernels: list[Kernel]

    @property
    def launches(self) -> int:
        """Kernels launched, fills of memory left out."""
        return sum(kernel.launches for kernel in self.kernels)


Times = dict[tuple[str, str, str], BlockTime]  # by kind of block, mode and pass


def measure(
    names: list[str],
    *,
    size: int = 224,
    batch: int = 64,
    listed: bool = False,
    json_file: Path | None = None,
) -> dict[str, Times]:
    """Times of the kinds of blocks of registered nets under autocast to bfloat16, as a table.

    A time is printed as soon as it is measured, and json_file is written after every net; on an
    interrupt both hold the times measured so far. listed: also print the kernels of each compiled
    pass. UserError without a CUDA device and for a net without `blocks` of tokens.
    """
    if not torch.cuda.is_available():
        raise UserError("times are those of a CUDA device, and torch sees none here")
    allow_variants()
    found: dict[str, Times] = {}
    try:
        for name in names:
            found[name] = {}
            _measure_net(name, found[name], size, batch)
            if json_file:
                write_json(json_file, found, _protocol(size, batch))
    finally:
        if any(found.values()):
            _show(found, _protocol(size, batch), listed, json_file)
    return found


def _measure_net(name: str, times: Times, size: int, batch: int) -> None:
    say(f"times of the blocks of {name}")
    net = make_net(name, find_backbone(name, size=size), "cpu", seed=0)
    kinds = kinds_of(name, net)
    tokens, width = shape_of(name, net, size)
    # The last kind first, as the others are compared with it.
    for block in reversed(kinds):
        kind = type(block).__name__
        for mode in MODES:
            for passed, step in steps_of(block, (batch, tokens, width), mode).items():
                time = times[kind, mode, passed] = time_pass(step)
                say(f"{name}: {kind}, {mode}, {passed}: {time.microseconds:.0f} us")


def _show(found: Mapping[str, Times], protocol: str, listed: bool, json_file: Path | None) -> None:
    _print(found, protocol)
    if listed:
        for name, times in found.items():
            _print_kernels(name, times)
    if json_file:
        say(f"written: {write_json(json_file, found, protocol)}")


def write_json(path: Path, found: Mapping[str, Times], protocol: str) -> Path:
    """Rows by net, with every kernel of every pass."""
    nets = {
        name: [
            {
                "block": kind,
                "mode": mode,
                "pass": passed,
                "microseconds": time.microseconds,
                "times_the_last": _ratio(times, kind, mode, passed),
                "launches": time.launches,
                "kernels": [kernel._asdict() for kernel in time.kernels],
            }
            for (kind, mode, passed), time in times.items()
        ]
        for name, times in found.items()
    }
    return write_measured(path, protocol, blocks=nets)


def steps_of(
    block: nn.Module, shape: tuple[int, int, int], mode: str, device: str = "cuda"
) -> dict[str, Callable[[], Any]]:
    """Both passes of a block on tokens [B T D], called as in the middle of its net."""
    block = block.to(device).train()
    run: Callable[..., Any] = torch.compile(block, fullgraph=True) if mode == "compiled" else block
    x = torch.randn(shape, device=device, requires_grad=True)
    autocast = partial(torch.autocast, device, torch.bfloat16, cache_enabled=False)
    inputs: list[Any]
    inputs, leaves = [x], [x, *block.parameters()]
    if getattr(block, "defers_sum", False):
        with torch.no_grad(), autocast():
            addend = terms_of(block(x, None, None, True))[1]
        assert addend is not None  # such a block leaves its last sum
        addend = addend._replace(tokens=addend.tokens.requires_grad_())
        inputs, leaves = [x, None, addend, True], [*leaves, addend.tokens]

    def forward() -> list[Tensor]:
        with autocast():
            found = run(*inputs)
        outputs = [found] if isinstance(found, Tensor) else found[:2]
        return [output for output in outputs if output is not None]

    with torch.no_grad():
        grads = [torch.randn_like(output) for output in forward()]

    def both() -> Sequence[Tensor]:
        return torch.autograd.grad(forward(), leaves, grads)

    return dict(zip(PASSES, (torch.no_grad()(forward), both), strict=True))


def time_pass(step: Callable[[], Any]) -> BlockTime:
    """Capture a pass, time its replays, and profile its kernels once."""
    device = torch.device("cuda", torch.cuda.current_device())
    recording = record(step, device)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    for mark in marks[:-1]:
        mark.record()
        recording.graph.replay()
    marks[-1].record()
    torch.cuda.synchronize()
    spans = [start.elapsed_time(end) for start, end in zip(marks, marks[1:], strict=False)]
    return BlockTime(1e3 * statistics.median(spans[1:]), _kernels_of(recording.graph.replay))


def _kernels_of(replay: Callable[[], None]) -> list[Kernel]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        replay()
        torch.cuda.synchronize()
    found = [
        Kernel(event.key, event.count, event.self_device_time_total)
        for event in trace.key_averages()
        if event.self_device_time_total and not event.key.startswith("Memset")
    ]
    return sorted(found, key=lambda kernel: -kernel.microseconds)


def _ratio(times: Times, kind: str, mode: str, passed: str) -> float | None:
    """Speed relative to the net's last kind of block, which was measured first."""
    last = times.get((next(iter(times))[0], mode, passed))
    return last.microseconds / times[kind, mode, passed].microseconds if last else None


def _protocol(size: int, batch: int) -> str:
    device = device_name(torch.device("cuda"))
    return (
        f"batch {batch}, {size} x {size} pixels, autocast to bfloat16, training mode, CUDA graphs, "
        f"median of {REPLAYS - 1} replays; {device}; torch {torch.__version__}"
    )


def _print(found: Mapping[str, Times], protocol: str) -> None:
    rows = []
    for name, times in found.items():
        kinds = list(dict.fromkeys(kind for kind, _, _ in times))[::-1]  # the last again last
        for kind, mode in ((kind, mode) for kind in kinds for mode in MODES):
            row: list[Any] = [name, kind, mode]
            for passed in PASSES:
                own = times.get((kind, mode, passed))
                row += [f"{own.microseconds:.0f}", own.launches] if own else [None, None]
                row += [_ratio(times, kind, mode, passed) if own else None]
            if any(cell is not None for cell in row[3:]):
                rows.append(row)
    columns = ["model", "block", "mode"]
    for words in ("forward", "forward,\nbackward"):
        columns += [f"{words}\nus", "kernels", "times the\nlast's"]
    print_table("time of a block", columns, rows, protocol=protocol)


def _print_kernels(name: str, times: Times) -> None:
    for (kind, mode, passed), found in times.items():
        if mode != "compiled":
            continue
        rows = [
            [_short(kernel.name), kernel.launches, f"{kernel.microseconds:.1f}"]
            for kernel in found.kernels[:LISTED]
        ]
        title = f"{name}: {kind}, {passed}"
        total = sum(kernel.microseconds for kernel in found.kernels)
        note = f"{len(rows)} longest of {len(found.kernels)}; all {total:.0f} us"
        print_table(title, ["kernel", "launches", "us"], rows, protocol=note)


def _short(name: str) -> str:
    """A kernel's name without its return type and arguments."""
    bare = re.sub(r"^void |\(anonymous namespace\)::|<unnamed>::", "", name)
    bare = re.split(r"[<(]", bare, maxsplit=1)[0]  # an argument may have a longer path
    return bare.rpartition("::")[2][:72] or name[:72]
