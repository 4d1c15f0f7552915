"""The command line of experiments/reproduce.py: which published checkpoint a file is of."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.progress import say
from evaluation.published import DINOV2, LAYOUTS, PUBLISHED, Published
from evaluation.results import print_table
from utils.config.build import plain
from utils.config.command_line import quoted, take_value
from utils.config.compose import parse_config
from utils.errors import UserError, fail

TASKS = ("seg_ade20k", "seg_voc2012")
USAGE = """usage: reproduce.py [FILE [--model NAME] [--seg-ade20k ROOT] [--seg-voc2012 ROOT] \
[flags] [key=value ...]]

Without FILE: the table of published checkpoints. With it: judge the file as its authors did, print
ours beside theirs, and say whether it reproduces (exit code 0) or not (1). --model is found from
the file's own names and shapes. ImageNet: --data-path DIR or the variable IMAGENET_PATH; figures of
segmentation are compared where the folder of their data is given.

all other flags and keys:
"""


def parse_reproduction(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """The config of the evaluation that a file's authors ran; None after printing the table.

    A mistake, such as a file that is no published checkpoint, is one line and exit code 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        print_published()
        return None
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        parse_config(default="evaluate.yaml", argv=["--help"], base="evaluate")
    try:
        options = _take_options(argv, {"--model", *(_flag(task) for task in TASKS)})
        if not argv or argv[0].startswith("-"):
            raise UserError("the file of weights comes first: reproduce.py FILE [flags]")
        from evaluation.reproduce import model_of  # late: --help and the table need no torch

        file = argv.pop(0)
        name = model_of(file, options.get("--model"))
        words = [f"weights={quoted(file)}", *_overrides(name, options), *argv]
    except UserError as error:
        fail(error)
    config = plain(parse_config(default=PUBLISHED[name].config, argv=words, base="evaluate"))
    return {**config, "published": name}


def print_published() -> None:
    """Print the table of published checkpoints, with their stated figures and links."""
    rows = [
        (name, entry.recipe, f"{entry.parameters_m} M", f"{entry.gmacs} G", *_stated(entry))
        for name, entry in PUBLISHED.items()
    ]
    columns = ("model", "recipe", "parameters", "multiply-adds", "top-1", "linear", "kNN")
    print_table(
        "published checkpoints", columns, rows, protocol="ImageNet-1k val, as their authors state"
    )
    for name, entry in PUBLISHED.items():
        say(f"{name}: {entry.link}")
    for recipe, layout in LAYOUTS.items():
        say(f"layout, {recipe}: {layout}")


def _stated(entry: Published) -> list[str | None]:
    keys = ("accuracy/acc1", "linear/linear_top1", "knn/best_top1")
    return [f"{entry.figures[key].value}" if key in entry.figures else None for key in keys]


def _flag(task: str) -> str:
    return "--" + task.replace("_", "-")


def _take_options(argv: list[str], names: set[str]) -> dict[str, str]:
    """Take `--name VALUE` and `--name=VALUE` out of a command line."""
    taken, waiting = {}, argv[:]
    argv.clear()
    while waiting:
        word = waiting.pop(0)
        name, _, inline = word.partition("=")
        if name in names:
            taken[name] = take_value(name, inline, waiting)
        else:
            argv.append(word)
    return taken


def _overrides(name: str, options: Mapping[str, str]) -> list[str]:
    """Overrides for a published model's config, besides its weights."""
    words = [f"output_dir=runs/reproduce_{name}"]
    if PUBLISHED[name].recipe != DINOV2:
        words.append(f"backbone={name}")
    for task in TASKS:
        if root := options.get(_flag(task)):
            words += [f"+probe@probes.{task}={task}", f"probes.{task}.train.root={quoted(root)}"]
    return words
