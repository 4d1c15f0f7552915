"""The command line of experiments/anatomy.py, which answers --help before torch is imported."""

import argparse
from collections.abc import Sequence
from pathlib import Path

ABOUT = """What the speed of a net is made of (docs/performance.md).

blocks    operators, compiled kernels and kept activations of each kind of block
times     how long a CUDA device works on each kind of block, and on which kernels
growth    time and memory over resolution, batch and depth, octic beside plain
roofline  the least time of each layer of a block on a chip, by operations and bytes"""


def make_parser() -> argparse.ArgumentParser:
    """The flags, each with the word it belongs to."""
    parser = argparse.ArgumentParser(
        description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("blocks", "times", "growth", "roofline"))
    add = parser.add_argument
    add("--models", default="", help="blocks, times: nets; growth: an octic one, a plain one")
    add("--size", type=int, default=224, help="pixels a side (224)")
    add("--batch-size", type=int, help="growth: images (1); times, roofline: images (64)")
    add(
        "--kernels",
        action="store_true",
        help="blocks: compile them too, a minute each; times: list them",
    )
    add("--float32", action="store_true", help="blocks: without autocast to bfloat16")
    add("--sizes", default="224,384,512,768,1024", help="growth: pixels a side")
    add("--batches", default="1,2,4,8", help="growth: images of a step")
    add("--depths", default="4,8,12,24", help="growth: blocks")
    add("--steps", type=int, default=3, help="growth: timed steps of each net (3)")
    add("--device", default="auto", help="growth: auto, cpu, cuda")
    add("--threads", type=int, help="growth: of a CPU; torch's choice if left out")
    add("--json", type=Path, help="growth, times: file for all figures")
    add("--picture", type=Path, help="growth: file for the picture, .png, .pdf or .svg")
    add("--chip", default="H200", help="roofline: H100 or H200")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = make_parser().parse_args(argv)
    from evaluation.cost.anatomy import show  # late: it imports torch

    show(words)
    return 0
