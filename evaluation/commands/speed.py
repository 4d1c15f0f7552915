"""The command line of experiments/speed.py, which answers --help before torch is imported."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from utils.command import Parser, as_command

ABOUT = """The whole speed table of this machine (docs/benchmarks.md).

Runs the measurements of configs/speed.yaml for the device that is here, CUDA or CPU, one after the
other, each a command of experiments/ with a limit of its own. FOLDER keeps the log and the figures
of each and table.md, and the same command goes on where it was cut off. Exit code: 0, 1 if a
measurement failed, 2 for a mistake, 130 after Ctrl-C."""


@as_command()
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = Parser(description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/speed"), metavar="FOLDER", help="runs/speed")
    add("--minutes", type=float, metavar="N", help="budget of all together; none if left out")
    add("--only", default="", metavar="NAME,NAME", help="these measurements alone")
    add("--list", action="store_true", help="show the measurements and their state, run nothing")
    add("--again", action="store_true", help="measure anew what has been measured")
    add("--device", default="auto", help="the list for auto, cuda or cpu")
    add("--config", type=Path, metavar="FILE", help="a list in place of configs/speed.yaml")
    words = parser.parse_args(argv)
    began = time.monotonic()
    from evaluation.cost.speed import show  # late: it imports torch

    return show(words, began)
