"""The flags of the benchmark of the data path, as overrides of configs/bench_data.yaml."""

from collections.abc import Sequence
from typing import Any

from utils.config.build import plain
from utils.config.command_line import (
    Option,
    help_page,
    meanings,
    read_command,
    read_words,
)
from utils.config.compose import parse_config

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


def parse_bench_data(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config a command line asks for; a mistake prints one line, exit code 2."""
    words = read_command(argv, _read, page=help_page(meanings(OPTIONS)))
    return plain(parse_config(default=CONFIG, argv=words, base="bench_data"))


def _read(argv: list[str]) -> list[str]:
    return read_words(argv, OPTIONS).overrides
