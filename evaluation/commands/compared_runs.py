"""What the command lines of the comparisons share: which runs they train, which they load."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.config.build import plain
from utils.config.command_line import Option, help_page, meanings, read_command, read_words
from utils.config.compose import compose_config, parse_config
from utils.config.files import CONFIGS, find_file
from utils.errors import UserError, fail

RUNS = "runs"  # of the finished config: name -> a training's config, or a file of weights
RECIPE_OPTIONS = {
    "--epochs": Option("epochs", "of every training", text=False),
    "--words": Option("words", "'key=value key=value' that hold for every training"),
    "--no-pictures": Option("pictures", "the table alone", "false"),
}


def parse_runs(
    argv: Sequence[str] | None,
    file: str,
    options: Mapping[str, Option],
    finish: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    """The config `file` as a command line changes it and `finish` completes it.

    A mistake, or UserError of `finish`, is one line and exit code 2.
    """

    def read(argv: Sequence[str]) -> list[str]:
        return [addable(word, file) for word in read_words(argv, options).overrides]

    words = read_command(argv, read, page=help_page(meanings(options)))
    config = plain(parse_config(default=file, argv=words, base=Path(file).stem))
    try:
        return finish(config)
    except UserError as error:
        fail(error)


def in_folders(runs: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with `runs`, each training in a folder of its own; UserError if there is none."""
    for name, run in runs.items():
        if isinstance(run, dict):
            run["name"], run["output_dir"] = name, f"{config['output_dir']}/{name}"
    if not any(isinstance(run, dict) for run in runs.values()):
        raise UserError(
            "models names no run file: what is loaded needs one with its data beside it"
        )
    return {**config, RUNS: dict(runs)}


def compose_run(source: str, config: Mapping[str, Any]) -> Any:
    """A training's config from a run file and words for it, or the path to load from.

    `epochs`, `words`, `seed` and `device` of the comparison's config hold for every training.
    """
    file, *own = source.split()
    if not file.endswith((".yaml", ".yml")):
        if not Path(source).exists():
            raise UserError(f"models: there is no {source}: a run file, a run folder or weights")
        return source
    words = [f"recipe.epochs={config['epochs']}", *str(config["words"] or "").split()]
    words += [f"seed={config['seed']}", f"device={config['device']}"]
    run = plain(compose_config(find_file(file), [*words, *own]))
    run["probes"] = {}  # everything is judged here
    return run


def addable(word: str, file: str) -> str:
    """`models.NAME=FILE`, `methods.NAME={...}` may name what the config file does not have."""
    group, _, rest = word.partition("=")[0].partition(".")
    name = rest.partition(".")[0]
    is_new = group in ("models", "methods") and f"  {name}:" not in (CONFIGS / file).read_text()
    return f"+{word}" if is_new and name else word
