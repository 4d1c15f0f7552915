"""The command line of experiments/anatomy.py, which answers --help before torch is imported."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from utils.command import WordParser, as_command

ABOUT = "What the speed of a net is made of (docs/performance.md)."


def make_parser() -> WordParser:
    """The words, each with its own flags."""
    parser = WordParser(ABOUT)
    add = parser.add_word(
        "blocks", "operators, compiled kernels and kept activations of each kind of block"
    )
    add("--models", default="", help="nets, with commas between")
    add("--size", type=int, default=224, help="pixels a side (224)")
    add("--kernels", action="store_true", help="compile them too, a minute each")
    add("--float32", action="store_true", help="without autocast to bfloat16")
    add = parser.add_word(
        "times", "how long a CUDA device works on each kind of block, and on which kernels"
    )
    add("--models", default="", help="nets, with commas between")
    add("--size", type=int, default=224, help="pixels a side (224)")
    add("--batch-size", type=int, default=64, help="images (64)")
    add("--kernels", action="store_true", help="list them")
    add("--json", type=Path, help="file for all figures")
    add = parser.add_word(
        "growth", "time and memory over resolution, batch and depth, octic beside plain"
    )
    add("--models", default="", help="an octic one, a plain one")
    add("--size", type=int, default=224, help="pixels a side (224)")
    add("--batch-size", type=int, default=1, help="images (1)")
    add("--sizes", default="224,384,512,768,1024", help="pixels a side")
    add("--batches", default="1,2,4,8", help="images of a step")
    add("--depths", default="4,8,12,24", help="blocks")
    add("--steps", type=int, default=3, help="timed steps of each net (3)")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--threads", type=int, help="of a CPU; torch's choice if left out")
    add("--json", type=Path, help="file for all figures")
    add("--picture", type=Path, help="file for the picture, .png, .pdf or .svg")
    add = parser.add_word(
        "roofline", "the least time of each layer of a block on a chip, by operations and bytes"
    )
    add("--batch-size", type=int, default=64, help="images (64)")
    add("--chip", default="H200", help="H100 or H200")
    return parser


def read(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The words, with the defaults of those left out; UserError for a flag of another `what`."""
    return make_parser().parse_args(argv)


@as_command()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = read(argv)
    from evaluation.cost.anatomy import show  # late: it imports torch

    show(words)
    return 0
