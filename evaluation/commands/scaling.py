"""The command line of experiments/scaling.py, which answers --help before torch is imported."""

from collections.abc import Sequence

from utils.command import WordParser, as_command

ABOUT = "What a step takes on many GPUs: what ranks send, measured here, and a model of the rest."


def make_parser() -> WordParser:
    """The words, each with its own flags."""
    parser = WordParser(ABOUT)
    add = parser.add_word("measure", "what the ranks of a step send each other, on this machine")
    add("--processes", default="2,4", help="in so many processes (2,4)")
    add = parser.add_word(
        "model", "arithmetic on stated assumptions, no measurement (docs/scaling.md)"
    )
    add("--config-file", default="dinov2/hybrid_vith16.yaml", help="of this run file")
    add("--gpus", default="1,4,8,32,64,256", help="on so many GPUs")
    add("--gpus-per-node", type=int, default=4, help="of them on a node (4)")
    add("--batch", type=int, default=1024, help="images per step (1024)")
    add("--tflops", type=float, default=100.0, help="sustained by a GPU (100)")
    add("--node-gb-s", type=float, default=200.0, help="between GPUs of a node (200)")
    add("--network-gb-s", type=float, default=12.5, help="per GPU between nodes (12.5)")
    add("--latency-us", type=float, default=10.0, help="of one message (10)")
    return parser


@as_command()
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    words = make_parser().parse_args(argv)
    from evaluation.cost.scaling import show  # late: it imports torch

    show(words)
    return 0
