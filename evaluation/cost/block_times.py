"""How long a CUDA device works on one block, eager and compiled, and on which kernels.

Each pass is captured as a CUDA graph and replayed, so that what is timed is the device and not the
host that launches; a block is called as its net calls it. A whole net in one mode is
`experiments/complexity.py`'s affair.
"""

import re
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evaluation.cost.blocks import kinds_of, shape_of
from evaluation.cost.graphs import record
from evaluation.cost.models import find_backbone, make_net
from evaluation.progress import say
from evaluation.results import print_table
from utils.errors import UserError
from utils.parallel import allow_variants

PASSES = ("forward", "forward and backward")
REPLAYS = 30
LISTED = 25  # kernels of a pass, the longest


class Kernel(NamedTuple):
    """What a kernel of one name takes in a pass, in microseconds, in all its launches."""

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
    names: list[str], *, size: int = 224, batch: int = 64, listed: bool = False
) -> dict[str, Times]:
    """Times of the kinds of blocks of registered nets under autocast to bfloat16, as a table.

    listed: also print the kernels of each compiled pass. Raises UserError without a CUDA device and
    for a net without `blocks`.
    """
    if not torch.cuda.is_available():
        raise UserError("times are those of a CUDA device, and torch sees none here")
    allow_variants()
    found = {}
    for name in names:
        say(f"times of the blocks of {name}")
        net = make_net(name, find_backbone(name, size=size), "cpu", seed=0)
        tokens, width = shape_of(net, size)
        found[name] = {
            (type(block).__name__, mode, kind): time_pass(step)
            for block in kinds_of(name, net)
            for mode in ("eager", "compiled")
            for kind, step in steps_of(block, (batch, tokens, width), mode).items()
        }
    _print(found, size, batch)
    if listed:
        for name, times in found.items():
            _print_kernels(name, times)
    return found


def steps_of(
    block: nn.Module, shape: tuple[int, int, int], mode: str
) -> dict[str, Callable[[], Any]]:
    """Both passes of a block on tokens [B T D], called as within a net."""
    block = block.cuda().train()
    run: Callable[..., Any] = torch.compile(block, fullgraph=True) if mode == "compiled" else block
    x = torch.randn(shape, device="cuda", requires_grad=True)
    inputs: tuple[Any, ...] = (x,)
    if getattr(block, "holds", False):
        branch = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        inputs = (x, None, branch, True)
    leaves = [t for t in inputs if isinstance(t, Tensor)] + list(block.parameters())

    def forward() -> Any:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return run(*inputs)

    with torch.no_grad():
        outputs = forward()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.randn_like(output) for output in outputs]

    def both() -> Any:
        found = forward()
        return torch.autograd.grad(found if isinstance(found, tuple) else [found], leaves, grads)

    return dict(zip(PASSES, (torch.no_grad()(forward), both), strict=True))


def time_pass(step: Callable[[], Any]) -> BlockTime:
    """Capture a pass, replay it, and look once at the kernels that run."""
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


def _print(found: dict[str, Times], size: int, batch: int) -> None:
    rows = []
    for name, times in found.items():
        plain = list(times)[-1][0]  # the last kind of a net
        for kind, mode in dict.fromkeys((kind, mode) for kind, mode, _ in times):
            row: list[Any] = [name, kind, mode]
            for passed in PASSES:
                own, other = times[kind, mode, passed], times[plain, mode, passed]
                row += [f"{own.microseconds:.0f}", own.launches]
                row += [f"{other.microseconds / own.microseconds:.2f}"]
            rows.append(row)
    columns = ["model", "block", "mode"]
    for words in ("forward", "forward,\nbackward"):
        columns += [f"{words}\nus", "kernels", "times the\nlast's"]
    device = torch.cuda.get_device_name()
    protocol = (
        f"batch {batch}, {size} x {size} pixels, autocast to bfloat16, training mode, CUDA graphs, "
        f"median of {REPLAYS - 1} replays; {device}; torch {torch.__version__}"
    )
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
        note = f"{LISTED} longest of {len(found.kernels)}; all {total:.0f} us"
        print_table(title, ["kernel", "launches", "us"], rows, protocol=note)


def _short(name: str) -> str:
    """A kernel's name without its return type and arguments."""
    name = re.sub(r"^void ", "", name).partition("<")[0]
    return name.rpartition("::")[2][:72] or name[:72]
