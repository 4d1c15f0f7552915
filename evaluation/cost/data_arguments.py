"""The flags of the benchmark of the data path, as overrides of configs/bench_data.yaml."""

import sys
from collections.abc import Sequence
from typing import Any

from utils.build import nearest, plain
from utils.command_line import TAKES_VALUE, Option, help_page, meanings, read_words
from utils.config import fail, parse_config
from utils.errors import UserError
from utils.flags import FLAGS

CONFIG = "bench_data.yaml"

OPTIONS = {
    "--root": Option("root", "folder of images; without one, photographs of 500 x 375"),
    "--images": Option("images", "how many different ones", text=False),
    "--batch-size": Option("batch_size", "images of a batch on the device", text=False),
    "--rounds": Option("rounds", "of turns, one of each stage", text=False),
    "--reading": Option(
        "reading", "images also read from disk: files, LMDB, tar shards", text=False
    ),
    "--scratch": Option("scratch", "folder these are written to, on the disk in question"),
    "--json": Option("json_file", "file for all figures with their protocol"),
}
KNOWN = {*OPTIONS, *TAKES_VALUE, "--help", *(name for flag in FLAGS for name in flag.names)}


def parse_bench_data(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config a command line asks for; a mistake is one line and exit code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print(help_page(meanings(OPTIONS)))
    try:
        for name in (word.partition("=")[0] for word in argv if word.startswith("--")):
            if name not in KNOWN:
                hint = nearest(name, KNOWN)
                raise UserError(f"unknown flag {name}{hint}; --help lists the flags")
        words = read_words(argv, OPTIONS).overrides
    except UserError as error:
        fail(error)
    return plain(parse_config(default=CONFIG, argv=words, base="bench_data"))
