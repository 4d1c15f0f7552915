"""Common parts of the comparisons' command lines: the runs to train, and those to load."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from utils.config.build import check_targets, plain
from utils.config.check import check_runs
from utils.config.command_line import Option, help_page, meanings, read_command, read_words
from utils.config.compose import compose_config, parse_config
from utils.config.files import CONFIGS, find_file
from utils.config.trainings import RUNS, in_folders
from utils.errors import UserError, fail
from utils.run_files import CONFIG

RECIPE_OPTIONS = {
    "--epochs": Option("epochs", "of every training", text=False),
    "--words": Option(
        "words", "'key=value key=value' for every training, in place of the config's"
    ),
    "--no-pictures": Option("pictures", "the table alone", "false"),
}


def parse_runs(
    argv: Sequence[str] | None,
    file: str,
    options: Mapping[str, Option],
    finish: Callable[[dict[str, Any]], dict[str, Any]],
    further: Callable[[dict[str, Any]], object] = lambda config: None,
) -> dict[str, Any]:
    """The config `file` with the overrides of a command line, completed by `finish`.

    A mistake, or a UserError of `finish`, prints one line and exits with code 2. `--check` prints
    the config and what each training costs, and exits; `further` is what it looks at besides.
    """

    def read(argv: Sequence[str]) -> list[str]:
        return [addable(word, file) for word in read_words(argv, options).overrides]

    words = read_command(argv, read, page=help_page(meanings(options)))
    others = [word for word in words if word != "--check"]  # which is for the runs, not for this
    config = plain(parse_config(default=file, argv=others, base=Path(file).stem))
    try:
        finished = finish(config)
        if len(others) == len(words):
            return finished
        check_targets(config)
        check_runs(config, finished[RUNS], lambda: further(finished))
    except UserError as error:
        fail(error)
    raise SystemExit(0)


def with_trainings(runs: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with `runs`, each training with its name and in its own folder.

    UserError if neither a training nor a folder to load from says which data to evaluate on.
    """
    for name, run in runs.items():
        if isinstance(run, dict):
            run["name"] = name
    if not any(isinstance(run, dict) or _is_run_folder(run) for run in runs.values()):
        raise UserError(
            f"models names neither a run file nor a run folder with its {CONFIG}: "
            "files of weights alone do not say which data to evaluate them on"
        )
    return in_folders({**config, RUNS: runs})


def compose_run(source: str, config: Mapping[str, Any]) -> Any:
    """The config of a training, from a run file and its overrides; or the path to load from.

    `epochs`, `words`, `seed` and `device` of the comparison's config apply to every training.
    """
    file, *own = source.split()
    if not file.endswith((".yaml", ".yml")):
        if not Path(source).exists():
            raise UserError(f"models: there is no {source}: a run file, a run folder or weights")
        return source
    words = [f"recipe.epochs={config['epochs']}", *str(config["words"] or "").split()]
    words += [f"seed={config['seed']}", f"device={config['device']}"]
    run = plain(compose_config(find_file(file), [*words, *own]))
    run["probes"] = {}  # the comparison itself evaluates the nets
    return run


def _is_run_folder(source: str) -> bool:
    return (Path(source).expanduser() / CONFIG).is_file()


def addable(word: str, file: str) -> str:
    """The override, with + if `models.NAME=` or `methods.NAME=` is not in the config file yet."""
    group, _, rest = word.partition("=")[0].partition(".")
    name = rest.partition(".")[0]
    if group not in ("models", "methods") or not name:
        return word
    content = yaml.safe_load((CONFIGS / file).read_text())
    return f"+{word}" if group in content and name not in content[group] else word
