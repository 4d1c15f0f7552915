"""The least time that each layer of a block can take on a chip: operations against bytes.

A layer reads its input and weights once and writes its output once; what it takes is at least the
larger of operations / peak and bytes / bandwidth (Williams et al. 2009). Arithmetic on data sheets,
not a measurement.
"""

from typing import NamedTuple

from evaluation.cost.peaks import known_peak
from evaluation.results import print_table
from utils.errors import UserError

# Bytes per second of the chip's memory, by the makers' data sheets (SXM).
BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12}
# Width, heads, patch side.
SIZES = {"S": (384, 6, 16), "B": (768, 12, 16), "L": (1024, 16, 16), "H": (1280, 16, 14)}
IMAGE = 224  # pixels a side
VALUE = 2  # bytes of a bfloat16


class Layer(NamedTuple):
    """One layer of a block on all tokens."""

    name: str
    operations: float
    moved_bytes: float

    def seconds(self, peak: float, bandwidth: float) -> float:
        """The least time."""
        return max(self.operations / peak, self.moved_bytes / bandwidth)


def layers_of(size: str, *, octic: bool, batch: int) -> list[Layer]:
    """The layers of a block of ViT-S/B/L/H, plain or octic (D4), each as one pass over memory.

    An octic linear layer has 3/16 of the multiply-adds and 1/8 of the weights of a plain one. The
    residual stream is float32, as under autocast.
    """
    width, _, patch = SIZES[size]
    length = (IMAGE // patch) ** 2 + 1
    tokens = batch * length
    one = tokens * width * VALUE  # bytes of a tensor of the block's width

    def linear(name: str, inputs: int, outputs: int) -> Layer:
        operations = 2 * tokens * inputs * outputs * width**2 * (3 / 16 if octic else 1)
        weights = inputs * outputs * width**2 * VALUE / (8 if octic else 1)
        return Layer(name, operations, (inputs + outputs) * one + weights)

    def passes(name: str, count: float) -> Layer:
        return Layer(name, 0.0, count * one)

    # q, k and v in the order of the heads, and back: a read and a write of each.
    split = [passes("split heads", 6)] if octic else []
    join = [passes("join heads", 2)] if octic else []
    norm, add = ("norm", 3), ("scale, add", 5)  # float32 in, bfloat16 out; twice in, once out
    return [
        passes(*norm),
        linear("qkv", 1, 3),
        *split,
        Layer("attention", 4 * tokens * length * width, 4 * one),
        *join,
        linear("proj", 1, 1),
        passes(*add),
        passes(*norm),
        linear("fc1", 1, 4),
        passes("GELU", 8),
        linear("fc2", 4, 1),
        passes(*add),
    ]


def show(chip: str, batch: int) -> None:
    """Print the least times of all layers on a chip, plain and octic, S to H."""
    if chip not in BANDWIDTHS:
        raise UserError(f"--chip is {' or '.join(BANDWIDTHS)}, not {chip!r}")
    if batch < 1:
        raise UserError("--batch-size must be at least 1")
    sheet = known_peak(chip, "bf16")
    assert sheet is not None
    peak, bandwidth = sheet.flops, BANDWIDTHS[chip]
    rows = []
    for size in SIZES:
        times = {}
        for octic in (False, True):
            layers = layers_of(size, octic=octic, batch=batch)
            least: dict[str, float] = {}
            for layer in layers:
                least[layer.name] = least.get(layer.name, 0) + layer.seconds(peak, bandwidth)
            times[octic] = least
        for name in times[True]:
            plain, own = times[False].get(name), times[True][name]
            (bound,) = {
                "bytes" if part.moved_bytes / bandwidth > part.operations / peak else "operations"
                for part in layers
                if part.name == name
            }
            rows.append([size, name, _us(plain), _us(own), bound])
        whole = [sum(times[octic].values()) for octic in (False, True)]
        rows.append([size, f"block: {whole[0] / whole[1]:.2f} times", *map(_us, whole), ""])
    columns = ["ViT", "layer", "plain\nus", "octic\nus", "octic layer\nbound by"]
    protocol = (
        f"{chip}: {peak / 1e12:.0f} TFLOP/s dense bfloat16, {bandwidth / 1e12:g} TB/s; batch "
        f"{batch}, {IMAGE} x {IMAGE} pixels, forward; arithmetic, nothing was run"
    )
    print_table("least time of each layer of a block", columns, rows, protocol=protocol)


def _us(seconds: float | None) -> str | None:
    return None if seconds is None else f"{1e6 * seconds:.0f}"
