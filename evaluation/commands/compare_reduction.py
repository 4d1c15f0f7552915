"""The command line of the comparison of token reductions: which methods, at which strengths."""

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.commands.compared_runs import (
    RECIPE_OPTIONS,
    compose_run,
    parse_runs,
    with_trainings,
)
from utils.config.command_line import Option
from utils.errors import UserError
from utils.nearest import nearest

CONFIG = "reduction_comparison.yaml"

OPTIONS = {
    "--methods": Option("only", "names of methods, with commas between: those alone"),
    "--no-speed": Option("speed_steps", "no images per second", "0"),
    "--no-segmentation": Option("segmentation.train_images", "no segmentation", "0"),
    **RECIPE_OPTIONS,
}


def parse_comparison(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config a command line asks for, each run file composed; a mistake is one line, code 2."""
    return parse_runs(argv, CONFIG, OPTIONS, with_runs)


def with_runs(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the chosen methods, and `runs`: each training, or the file to load from."""
    methods = chosen_methods(config["methods"], config["only"])
    models = {name: str(source) for name, source in config["models"].items() if source}
    runs = {name: compose_run(source, config) for name, source in models.items()}
    return with_trainings(runs, {**config, "methods": methods})


def chosen_methods(methods: Mapping[str, Any], only: str | None) -> dict[str, Any]:
    """The named methods, or all; UserError for one that is unknown or incomplete."""
    if only and not isinstance(only, str):
        raise UserError(f"only must be names of methods with commas between, not {only!r}")
    names = [word.strip() for word in only.split(",") if word.strip()] if only else list(methods)
    for name in names:
        if name not in methods:
            raise UserError(f"no method {name!r}{nearest(name, methods)} ({', '.join(methods)})")
        missing = [key for key in ("method", "over", "values") if not methods[name].get(key)]
        if missing:
            raise UserError(f"methods.{name} says no {', '.join(missing)}")
    return {name: methods[name] for name in names}
