"""The command line of experiments/reproduce.py: which published checkpoint a file is of."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.progress import say
from evaluation.published import DINOV2, LAYOUTS, MEASURED_IN, PUBLISHED, SEGMENTED_IN, Published
from evaluation.results import print_table
from utils.config.build import plain
from utils.config.command_line import quoted, refuse_unknown_flags, sorted_words
from utils.config.compose import parse_config
from utils.errors import UserError, fail
from utils.ranges import check_word

TASKS = {"seg_ade20k": "ADE20K", "seg_voc2012": "VOC2012"}
# A line of a model's figures in the table: what it begins with, and the words for the figures.
_LINES: tuple[tuple[str, dict[str, str]], ...] = (
    ("", {"accuracy/acc1": "top-1", "accuracy/acc5": "top-5"}),
    ("", {"accuracy/loss": "loss"}),
    ("", {"linear/linear_top1": "linear", "knn/best_top1": "kNN"}),
    *(
        (f"{data} ", {f"{task}/logreg_miou": "logreg", f"{task}/knn_miou": "kNN"})
        for task, data in TASKS.items()
    ),
)
USAGE = """usage: reproduce.py [FILE [--model NAME] [--precision X] [--seg-ade20k ROOT] \
[--seg-voc2012 ROOT] [flags] [key=value ...]]

Without FILE: the table of published checkpoints. With it: judge the file as its authors did, print
ours beside theirs, and say whether it reproduces (exit code 0) or not (1). --model is found from
the file's own names and shapes. --precision is fp32, bf16, fp16 or auto: as published on a GPU
(fp16; SWAG fp32; segmentation bf16), fp32 on a CPU. ImageNet: --data-path DIR or the variable
IMAGENET_PATH; figures of segmentation are compared where the folder of their data is given.

all other flags and keys:
"""


def parse_reproduction(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """The config of the evaluation that a file's authors ran; None after printing the table.

    A mistake, such as a file that is no published checkpoint or images that are not ImageNet's, is
    one line and exit code 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        print_published()
        return None
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        parse_config(default="evaluate.yaml", argv=["--help"], base="evaluate")
    try:
        own = {"--model", "--precision", *(_flag(task) for task in TASKS)}
        refuse_unknown_flags(argv, own)
        options = _take_options(argv, own)
        if not argv or argv[0].startswith("-"):
            raise UserError("the file of weights comes first: reproduce.py FILE [flags]")
        # Late: --help and the table need no torch.
        from evaluation.reproduce import JUDGED_IN, check_images, model_of

        check_word("--precision", options.setdefault("--precision", "auto"), JUDGED_IN)
        file = argv.pop(0)
        name = model_of(file, options.get("--model"))
        words = [f"weights={quoted(file)}", *_overrides(name, options), *argv]
    except UserError as error:
        fail(error)
    config = plain(parse_config(default=PUBLISHED[name].config, argv=words, base="evaluate"))
    if config["launcher"]["kind"] != "slurm":  # a job may see images that this machine does not
        try:
            check_images(config["data"])  # before the run makes its folder
        except UserError as error:
            fail(error)
    return {**config, "published": name}


def print_published() -> None:
    """Print the table of published checkpoints, with their stated figures and links."""
    rows = [
        (name, entry.recipe, f"{entry.parameters_m} M, {entry.gmacs} G", _stated(entry))
        for name, entry in PUBLISHED.items()
    ]
    measured = ", ".join(f"{recipe} {precision}" for recipe, precision in MEASURED_IN.items())
    print_table(
        "published checkpoints; their millions of parameters and billions of multiply-adds",
        ("model", "recipe", "size", "figures"),
        rows,
        protocol="as their authors state: ImageNet-1k val, segmentation mIoU; on GPUs under "
        f"autocast: {measured}, segmentation {SEGMENTED_IN}",
    )
    for name, entry in PUBLISHED.items():
        say(f"{name}: {entry.link}")
    for recipe, layout in LAYOUTS.items():
        say(f"layout, {recipe}: {layout}")


def _stated(entry: Published) -> str:
    """All figures of a checkpoint, a few to a line."""
    figures, lines = entry.figures, []
    for begin, words in _LINES:
        shown = [f"{word} {figures[key].value}" for key, word in words.items() if key in figures]
        lines += [begin + ", ".join(shown)] if shown else []
    return "\n".join(lines)


def _flag(task: str) -> str:
    return "--" + task.replace("_", "-")


def _take_options(argv: list[str], names: set[str]) -> dict[str, str]:
    """Take `--name VALUE` and `--name=VALUE` out of a command line."""
    sorted_argv = [*sorted_words(argv, dict.fromkeys(names, 1))]
    argv[:] = [word for name, words in sorted_argv if not name for word in words]
    return {name: values[0] for name, values in sorted_argv if name}


def _overrides(name: str, options: Mapping[str, str]) -> list[str]:
    """Overrides for a published model's config, besides its weights."""
    words = [f"output_dir=runs/reproduce_{name}"]
    if PUBLISHED[name].recipe != DINOV2:
        words.append(f"backbone={name}")
    probes = {key.partition("/")[0] for key in PUBLISHED[name].figures} - TASKS.keys()
    for task in TASKS:
        if root := options.get(_flag(task)):
            words += [f"+probe@probes.{task}={task}", f"probes.{task}.train.root={quoted(root)}"]
            probes.add(task)
    words += [f"probes.{probe}.precision={options['--precision']}" for probe in sorted(probes)]
    return words
