"""The flags of the comparison of costs, as overrides of configs/complexity.yaml."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from utils.build import nearest, plain
from utils.config import fail, parse_config
from utils.errors import UserError
from utils.flags import FLAGS

CONFIG = "complexity.yaml"


class Option(NamedTuple):
    """A flag: the key it sets, what it means, and the value (None: the next word)."""

    key: str
    help: str
    value: str | None = None


OPTIONS = {
    "--models": Option("models", "names of ours or of timm's, with commas between; all: all ours"),
    "--amp": Option("amp", "autocast to bfloat16", "true"),
    "--compile": Option("compile", "through torch.compile", "true"),
    "--batch-size": Option("batch_size", "images of a step"),
    "--size": Option("size", "pixels a side"),
    "--steps": Option("steps", "timed steps of each net"),
    "--warmup": Option("warmup", "steps before them"),
    "--rounds": Option("rounds", "of turns that the timed steps are dealt out over"),
    "--no-training": Option("passes", "time no training step", "[inference]"),
    "--no-inference": Option("passes", "time no inference", "['training step']"),
    "--check": Option("passes", "count parameters and multiply-adds, time nothing", "[]"),
    "--threads": Option("threads", "of a CPU"),
    "--operators": Option("operators", "count the operators that run, views aside", "true"),
    "--fvcore": Option("fvcore", "count by fvcore too, and say what it counts besides", "true"),
    "--json": Option("json_file", "file for all figures with their protocol"),
    "--picture": Option("picture_file", "file for a picture: .png, .pdf or .svg"),
    "--picture-y": Option("picture_y", "what it shows over multiply-adds: throughput, accuracy"),
}
TEXT = {"json_file", "picture_file", "picture_y"}
FILES = ("--config-file", "--config")
TAKES_VALUE = {*FILES, *(name for flag in FLAGS if flag.kind is not None for name in flag.names)}
KNOWN = {*OPTIONS, *FILES, "--help", *(name for flag in FLAGS for name in flag.names)}


def parse_complexity(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config a command line asks for; a mistake is one line and exit code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print(_help())
    try:
        words = read_complexity_arguments(argv)
    except UserError as error:
        fail(error)
    return plain(parse_config(default=CONFIG, argv=words, base="complexity"))


def read_complexity_arguments(argv: Sequence[str]) -> list[str]:
    """Overrides for `[flags] [key=value ...]`; other flags pass as they are."""
    words = list(argv)
    rest: list[str] = []
    passes: list[str] = []
    while words:
        word = words.pop(0)
        name, _, inline = word.partition("=")
        if name.startswith("--") and name not in KNOWN:
            raise UserError(f"unknown flag {name}{nearest(name, KNOWN)}; --help lists the flags")
        if name not in OPTIONS:
            rest.append(word)
            if word in TAKES_VALUE and words:
                rest.append(words.pop(0))
            continue
        option = OPTIONS[name]
        if option.value is not None:
            (passes if option.key == "passes" else rest).append(f"{option.key}={option.value}")
            continue
        value = inline or (words.pop(0) if words else "")
        if not value or value.startswith("--"):
            raise UserError(f"{name} needs a value: {option.help}")
        rest.append(f"{option.key}={_override(option.key, value)}")
    # Neither pass, by both flags, is a count alone.
    return rest + ([passes[0]] if len(set(passes)) == 1 else ["passes=[]"] if passes else [])


def _override(key: str, value: str) -> str:
    """A value in the grammar of overrides."""
    if key == "models":
        names = [name.strip() for name in value.split(",") if name.strip()]
        if not names:
            raise UserError("--models needs names, with commas between them")
        return f"[{','.join(map(_quoted, names))}]"
    return _quoted(value) if key in TEXT else value


def _quoted(text: str) -> str:
    return "'" + text.replace("\\'", "\\\\'").replace("'", "\\'") + "'"


def _help() -> str:
    lines = [
        f"{sys.modules['__main__'].__doc__ or ''}",
        "flags of the comparison (they come before those below of the same name):",
    ]
    for name, option in OPTIONS.items():
        lines.append(f"  {name:<15} {option.help} ({option.key})")
    return "\n".join(lines) + "\n\nall other flags and keys:\n"
