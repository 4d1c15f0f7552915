"""Measure the cost of probes, to check the cost model: the real code on synthetic features.

Each measurement runs in its own process on the CPU, and gives seconds and the peak resident memory
above what the imports had taken.
"""

import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evaluation.features.dataset import FeatureSet, full_float32_products, normalize_rows
from evaluation.probes.costs import Plan, Rates
from evaluation.probes.knn import KnnProbe
from evaluation.probes.linear import MOMENTUM, RATES
from evaluation.probes.linear_heads import LinearHeads, head_losses, make_grid
from evaluation.probes.neighbours import SEARCH_DTYPES, Neighbours, merge_neighbours
from evaluation.probes.training import train_heads
from utils.errors import UserError
from utils.schedules import Cosine
from vit.backbone import Features

FILL = 8192  # rows drawn at a time


class Measured(NamedTuple):
    """Peak memory and time of one run of the real code."""

    bytes: int
    seconds: float


def measure(probe: str, plan: Plan) -> Measured:
    """Run a probe at this size in a process of its own; UserError for what cannot be measured."""
    if plan.processes > 1 or plan.device != "cpu":
        raise UserError("--measure runs one process on the CPU; add --processes 1 --device cpu")
    return Measured(
        **run_apart(
            f"{probe} probe", "evaluation.probes.measure", probe, json.dumps(plan._asdict())
        )
    )


def run_apart(what: str, module: str, *words: str) -> Any:
    """What `work(*words)` of a module prints last, as JSON, in a process of its own.

    UserError, which names `what` is measured, if that process fails, as where memory runs out.
    """
    call = f"import sys; from {module} import work; work(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", call, *words],
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise UserError(f"the {what} failed at this size (exit code {done.returncode})")
    return json.loads(done.stdout.splitlines()[-1])


def work(probe: str, settings: str) -> None:
    """Body of the measuring process: warm up, reset the peak, prepare, run, print as JSON."""
    plan = Plan(**json.loads(settings))
    prepare = {"knn": _prepare_knn, "linear": _prepare_linear}[probe]
    _warm_up()
    base = forget_peak()
    run = prepare(plan)
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    print(json.dumps({"bytes": peak_bytes() - base, "seconds": seconds}))


@torch.no_grad()
def measure_rates(probe: str, plan: Plan) -> Rates:
    """Measure the rates of this machine at the shapes of the probe; takes some seconds."""
    device = torch.device(plan.device)
    rows = min(plan.chunk_size, 16384, plan.train)
    k = min(max(plan.ks), rows)
    a = torch.randn(1024, plan.dim, device=device)
    b = torch.randn(rows, plan.dim, device=device)
    similarities = a @ b.T
    best = Neighbours(*similarities.topk(k, dim=1))
    block = torch.zeros(2**24, device=device)
    if probe == "linear":
        width, outputs = 5 * plan.dim, min(plan.rates * plan.classes, 13_000)
        a, b = (torch.randn(rows, width, device=device) for rows in (plan.batch_size, outputs))
    logits = torch.randn(4 * plan.rates, plan.batch_size, plan.classes, device=device)
    labels = torch.zeros(plan.batch_size, dtype=torch.int64, device=device)

    @torch.enable_grad()
    def loss() -> None:
        head_losses(logits.detach().requires_grad_(), labels).sum().backward()

    with full_float32_products(device):
        return Rates(
            gemm_flops=2 * a.shape[0] * b.numel() / _seconds(lambda: a @ b.T, device),
            topk_numbers=similarities.numel()
            / _seconds(lambda: similarities.topk(k, dim=1), device),
            merged_rows=1024 / _seconds(lambda: merge_neighbours([best, best], k), device),
            # Read twice, written once.
            bytes_moved=3 * 4 * block.numel() / _seconds(lambda: block.add_(block), device),
            losses=logits.numel() / _seconds(loss, device),
        )


def _prepare_knn(plan: Plan) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    sets = [_random_rows(count, plan, generator) for count in (plan.train, plan.val)]
    probe = KnnProbe(ks=plan.ks, search_precision=plan.search_precision, chunk_size=plan.chunk_size)
    return lambda: probe.evaluate(*sets, device="cpu")


def _random_rows(count: int, plan: Plan, generator: torch.Generator) -> FeatureSet:
    """Normalised rows of random numbers, filled in place, so that nothing else takes memory."""
    rows = torch.empty(count, plan.dim, dtype=SEARCH_DTYPES[plan.search_precision])
    for start in range(0, count, FILL):
        part = torch.randn(min(FILL, count - start), plan.dim, generator=generator)
        rows[start : start + FILL] = normalize_rows(part)
    labels = torch.randint(plan.classes, (count,), generator=generator)
    return FeatureSet(rows, labels, torch.arange(count))


def _prepare_linear(plan: Plan) -> Callable[[], object]:
    heads = LinearHeads(
        make_grid((1, 4), (False, True), RATES[: plan.rates]),
        embed_dim=plan.dim,
        num_classes=plan.classes,
    )
    optimizer = torch.optim.SGD(
        [{"params": list(heads.parameters()), "initial_lr": 1.0}], lr=1.0, momentum=MOMENTUM
    )
    generator = torch.Generator().manual_seed(0)
    size = plan.batch_size
    tokens = torch.randn(4, size, plan.dim, generator=generator)
    # One patch per image: the memory of the net's output is not the probe's.
    blocks = [Features(token, token[:, None, None]) for token in tokens]
    labels = torch.randint(plan.classes, (size,), generator=generator)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield labels, labels

    def run() -> None:
        with full_float32_products(torch.device("cpu")):
            for _ in train_heads(
                heads,
                lambda _: blocks,
                optimizer,
                batches(),
                schedule=Cosine(base=1.0, final=0.0, num_steps=plan.steps),
                num_steps=plan.steps,
                accumulation=max(1, plan.global_batch_size // size),
                images_per_step=plan.global_batch_size,
            ):
                pass
            judged = 0
            with torch.no_grad():
                while judged < plan.val * plan.evaluations:
                    heads(heads.read(blocks)).topk(5, dim=-1)
                    judged += size

    return run


def _warm_up() -> None:
    """Let torch set up its threads and buffers, which are not the probe's cost."""
    a = torch.randn(512, 512)
    (a @ a).topk(10, dim=1)


def _seconds(run: Callable[[], object], device: torch.device, *, budget_s: float = 1.0) -> float:
    """The median time of several runs, without the first."""
    found: list[float] = []
    while len(found) < 4 or sum(found) < budget_s:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return sorted(found[1:])[len(found[1:]) // 2]


def forget_peak() -> int:
    """Reset the peak of resident memory, where the system allows it; returns the bytes now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """The highest resident memory of this process, in bytes."""
    # On Linux a child's ru_maxrss starts at its parent's value; VmHWM does not.
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
