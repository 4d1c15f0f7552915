"""The command line of the comparison of token reductions: which runs it trains, which it loads."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.command_line import Option, help_page, meanings, read_words
from evaluation.symmetry_comparison_arguments import RUNS, addable, compose_run
from utils.build import nearest, plain
from utils.config import fail, parse_config
from utils.errors import UserError

CONFIG = "reduction_comparison.yaml"

OPTIONS = {
    "--epochs": Option("epochs", "of every training", text=False),
    "--words": Option("words", "'key=value key=value' that hold for every training"),
    "--methods": Option("only", "names of methods, with commas between: those alone"),
    "--no-pictures": Option("pictures", "the table alone", "false"),
    "--no-speed": Option("speed_steps", "no images per second", "0"),
    "--no-segmentation": Option("segmentation.train_images", "no segmentation", "0"),
}


def parse_comparison(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config a command line asks for, each run file composed; a mistake is one line, code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print(help_page(meanings(OPTIONS)))
    try:
        words = [addable(word, CONFIG) for word in read_words(argv, OPTIONS).overrides]
    except UserError as error:
        fail(error)
    config = plain(parse_config(default=CONFIG, argv=words, base="reduction_comparison"))
    try:
        methods = chosen_methods(config["methods"], config["only"])
        return with_runs({**config, "methods": methods})
    except UserError as error:
        fail(error)


def with_runs(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with `runs`: every model's training, or the file it is loaded from."""
    runs = {
        name: compose_run(str(source), config)
        for name, source in config["models"].items()
        if source
    }
    for name, run in runs.items():
        if isinstance(run, dict):
            run["name"], run["output_dir"] = name, f"{config['output_dir']}/{name}"
    if not any(isinstance(run, dict) for run in runs.values()):
        raise UserError(
            "models names no run file: what is loaded needs one with its data beside it"
        )
    return {**config, RUNS: runs}


def chosen_methods(methods: Mapping[str, Any], only: str | None) -> dict[str, Any]:
    """The methods named, or all; UserError for one that is unknown or says too little."""
    names = [word.strip() for word in only.split(",") if word.strip()] if only else list(methods)
    for name in names:
        if name not in methods:
            raise UserError(f"no method {name!r}{nearest(name, methods)} ({', '.join(methods)})")
        missing = [key for key in ("method", "over", "values") if not methods[name].get(key)]
        if missing:
            raise UserError(f"methods.{name} says no {', '.join(missing)}")
    return {name: methods[name] for name in names}
