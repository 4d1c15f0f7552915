"""The command line of experiments/anatomy.py, which answers --help before torch is imported."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from utils.command import Parser, as_command

ABOUT = """What the speed of a net is made of (docs/performance.md).

blocks    operators, compiled kernels and kept activations of each kind of block
times     how long a CUDA device works on each kind of block, and on which kernels
growth    time and memory over resolution, batch and depth, octic beside plain
roofline  the least time of each layer of a block on a chip, by operations and bytes"""


# Flag -> the words that read it.
READERS = {
    "models": ("blocks", "times", "growth"),
    "size": ("blocks", "times", "growth"),
    "batch_size": ("growth", "times", "roofline"),
    "kernels": ("blocks", "times"),
    "float32": ("blocks",),
    "json": ("growth", "times"),
    "chip": ("roofline",),
    **dict.fromkeys(
        ("sizes", "batches", "depths", "steps", "device", "threads", "picture"), ("growth",)
    ),
}
DEFAULTS = {
    "models": "",
    "size": 224,
    "batch_size": None,  # 1 or 64
    "kernels": False,
    "float32": False,
    "sizes": "224,384,512,768,1024",
    "batches": "1,2,4,8",
    "depths": "4,8,12,24",
    "steps": 3,
    "device": "auto",
    "threads": None,  # torch's choice
    "json": None,
    "picture": None,
    "chip": "H200",
}


def make_parser() -> Parser:
    """The flags, each with the words that read it; what is not given is not in the namespace."""
    parser = Parser(
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("what", choices=("blocks", "times", "growth", "roofline"))
    add = parser.add_argument
    add("--models", help="blocks, times: nets; growth: an octic one, a plain one")
    add("--size", type=int, help="blocks, times, growth: pixels a side (224)")
    add("--batch-size", type=int, help="growth: images (1); times, roofline: images (64)")
    add(
        "--kernels",
        action="store_true",
        help="blocks: compile them too, a minute each; times: list them",
    )
    add("--float32", action="store_true", help="blocks: without autocast to bfloat16")
    add("--sizes", help="growth: pixels a side")
    add("--batches", help="growth: images of a step")
    add("--depths", help="growth: blocks")
    add("--steps", type=int, help="growth: timed steps of each net (3)")
    add("--device", help="growth: auto, cpu, cuda")
    add("--threads", type=int, help="growth: of a CPU; torch's choice if left out")
    add("--json", type=Path, help="growth, times: file for all figures")
    add("--picture", type=Path, help="growth: file for the picture, .png, .pdf or .svg")
    add("--chip", help="roofline: H100 or H200")
    return parser


def read(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The words, and the defaults of those left out; UserError for a flag of another `what`."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    what = given.pop("what")
    for name in given:
        if what not in READERS[name]:
            flag, readers = name.replace("_", "-"), " and ".join(READERS[name])
            parser.error(f"--{flag} is for {readers}; {what} does not read it")
    return argparse.Namespace(what=what, **{**DEFAULTS, **given})


@as_command()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = read(argv)
    from evaluation.cost.anatomy import show  # late: it imports torch

    show(words)
    return 0
