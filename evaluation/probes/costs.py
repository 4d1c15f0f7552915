"""A cost model of the kNN and linear probes: memory and time of one process, by formula.

docs/probe_costs.md explains the formulas. The net itself, its pass over the images, Python and
torch are not included. Letters: N training rows, M validation rows, D width, C classes, W
processes, k the largest number of neighbours, H heads, P parameters of all heads, B batch.
"""

from collections.abc import Callable
from typing import NamedTuple

FLOAT, INDEX = 4, 8  # bytes
SEARCH_BYTES = {"fp32": 4, "fp16": 2}


class Plan(NamedTuple):
    """The size of a probe and its settings, which default to the probe's own."""

    train: int = 1_281_167  # N
    val: int = 50_000  # M
    dim: int = 1280  # D
    classes: int = 1000  # C
    processes: int = 1  # W
    device: str = "cuda"  # "cpu": device memory is host memory, and what is there is not copied
    search_precision: str = "fp32"
    ks: tuple[int, ...] = (10, 20, 100, 200)
    chunk_size: int = 65536
    query_batch: int = 1024
    rates: int = 13  # learning rates, of each of the four inputs
    batch_size: int = 128  # B, per process
    global_batch_size: int = 1024
    steps: int = 12_500
    evaluations: int = 10


class Rates(NamedTuple):
    """Measured rates of a machine, per second."""

    gemm_flops: float  # of a float32 product of the probe's shape
    topk_numbers: float  # that a top-k is taken of
    merged_rows: float  # of queries whose best k of two lists are joined
    bytes_moved: float  # read or written in an addition in place
    losses: float  # of logits, through the cross entropy and back

    def __str__(self) -> str:
        return (
            f"{self.gemm_flops / 1e9:,.1f} GFLOP/s, top-k of {self.topk_numbers / 1e9:.2f} G "
            f"numbers/s, {self.merged_rows:,.0f} merged rows/s, {self.bytes_moved / 1e9:.1f} GB/s, "
            f"cross entropy of {self.losses / 1e6:,.0f} M logits/s"
        )


class Part(NamedTuple):
    """One consumer of memory, in bytes per process."""

    what: str
    host: float = 0
    device: float = 0


class Costs(NamedTuple):
    """The parts that make up the peak of memory, and seconds by activity."""

    parts: list[Part]
    seconds: dict[str, float]

    @property
    def host(self) -> float:
        """Bytes of host memory at the highest point."""
        return sum(part.host for part in self.parts)

    @property
    def device(self) -> float:
        """Bytes of device memory at the highest point."""
        return sum(part.device for part in self.parts)


def knn_costs(plan: Plan, rates: Rates) -> Costs:
    """kNN as `probes.knn` does it: each process searches its own rows for all queries."""
    number = SEARCH_BYTES[plan.search_precision]
    own, k = -(-plan.train // plan.processes), max(plan.ks)
    chunk = min(plan.chunk_size, own)
    queries = min(plan.query_batch, plan.val)
    several, on_cpu = plan.processes > 1, plan.device == "cpu"
    matrix = plan.val * plan.dim * number
    neighbours = plan.val * k * (FLOAT + INDEX)
    parts = [
        Part("training rows of this process", host=own * plan.dim * number),
        # Gathering holds the ranks' parts beside the whole, ordering two copies of it.
        Part("validation rows, on every process", host=matrix * (2 if several else 1)),
        Part("labels and indices", host=2 * INDEX * (own + plan.val)),
        *([Part("labels while gathered", host=6 * INDEX * plan.train)] if several else []),
        # The next chunk arrives before the previous one is freed.
        *([] if on_cpu else [Part("queries", device=matrix)]),
        *([] if on_cpu else [Part("two chunks of rows", device=2 * chunk * plan.dim * number)]),
        Part("similarities of a block", device=queries * chunk * number),
        Part("best k of all queries, and joined", device=2 * neighbours),
        Part("votes of a block", device=(len(plan.ks) + 1) * queries * plan.classes * FLOAT),
    ]
    chunks = -(-own // chunk)
    seconds = {
        "products": 2 * plan.val * own * plan.dim / rates.gemm_flops,
        "top-k": plan.val * own / rates.topk_numbers,
        "joining lists": plan.val * chunks / rates.merged_rows,
    }
    return Costs(_on_host(parts) if on_cpu else parts, seconds)


def linear_costs(plan: Plan, rates: Rates) -> Costs:
    """The grid of `probes.linear`: training and evaluating the heads, without the net's passes.

    Four inputs of D, 2 D, 4 D and 5 D channels; each has `rates` heads.
    """
    width, heads = 12 * plan.dim, 4 * plan.rates
    parameters = plan.rates * plan.classes * width + heads * plan.classes
    largest = plan.rates * plan.classes * 5 * plan.dim * FLOAT
    micro_batches = max(1, plan.global_batch_size // (plan.batch_size * plan.processes))
    logits = plan.batch_size * heads * plan.classes * FLOAT
    gathers = plan.processes > 1
    parts = [
        Part("heads", device=parameters * FLOAT),
        Part("gradients", device=parameters * FLOAT),
        Part("momentum", device=parameters * FLOAT),
        Part("inputs of a batch", device=plan.batch_size * width * FLOAT),
    ]
    # First the logits, their log-softmax and the gradients of both, before the heads' gradients;
    # then a second gradient for the largest input, while it is accumulated or averaged.
    before, after = 4 * logits, 2.25 * logits
    after += largest * (2 if gathers else 1 if micro_batches > 1 else 0)
    parts.append(Part("logits and gradients on the way", device=max(before, after)))
    own = plan.global_batch_size / plan.processes
    judged = -(-plan.val // plan.processes) * plan.evaluations
    seconds = {
        "products of the training": plan.steps * 4 * own * parameters / rates.gemm_flops,
        "cross entropies": plan.steps * own * heads * plan.classes / rates.losses,
        # SGD reads and writes: momentum twice, heads once, gradients twice; then new gradients.
        "moving heads": plan.steps
        * (8 + 3 * (micro_batches - 1) + 1)
        * parameters
        * FLOAT
        / rates.bytes_moved,
        "products of judging": 2 * judged * parameters / rates.gemm_flops,
    }
    return Costs(_on_host(parts) if plan.device == "cpu" else parts, seconds)


MODELS: dict[str, Callable[[Plan, Rates], Costs]] = {"knn": knn_costs, "linear": linear_costs}


def _on_host(parts: list[Part]) -> list[Part]:
    return [Part(part.what, host=part.host + part.device) for part in parts]
