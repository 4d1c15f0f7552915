"""The command line of experiments/scaling.py, which answers --help before torch is imported."""

import argparse
from collections.abc import Sequence

from utils.command import Parser, as_command

ABOUT = """What a step takes on many GPUs: what ranks send, measured here, and a model of the rest.

The model is arithmetic on stated assumptions, not a measurement (docs/scaling.md)."""


@as_command()
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = Parser(description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "model"))
    add = parser.add_argument
    add("--processes", default="2,4", help="measure: in so many processes (2,4)")
    add("--config-file", default="dinov2/hybrid_vith16.yaml", help="model: of this run file")
    add("--gpus", default="1,4,8,32,64,256", help="model: on so many GPUs")
    add("--gpus-per-node", type=int, default=4, help="model: of them on a node (4)")
    add("--batch", type=int, default=1024, help="model: images per step (1024)")
    add("--tflops", type=float, default=100.0, help="model: sustained by a GPU (100)")
    add("--node-gb-s", type=float, default=200.0, help="model: between GPUs of a node (200)")
    add("--network-gb-s", type=float, default=12.5, help="model: per GPU between nodes (12.5)")
    add("--latency-us", type=float, default=10.0, help="model: of one message (10)")
    words = parser.parse_args(argv)
    from evaluation.cost.scaling import show  # late: it imports torch

    show(words)
    return 0
