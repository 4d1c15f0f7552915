"""The command line of the comparison of symmetric nets: which runs it trains, which it loads."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.command_line import Option, help_page, meanings, read_words
from utils.build import nearest, plain
from utils.config import CONFIGS, compose_config, fail, find_file, parse_config
from utils.errors import UserError

CONFIG = "symmetry_comparison.yaml"
UPRIGHT, TURNED = "upright", "turned"
RUNS = "runs"  # of the finished config: name -> a training's config, or a file of weights

OPTIONS = {
    "--turned": Option(
        "trained_on", "train each model on turned digits as well", "[upright,turned]"
    ),
    "--train-heads": Option("posthoc.trained", "train the head under each aggregator", "head"),
    "--epochs": Option("epochs", "of every training", text=False),
    "--words": Option("words", "'key=value key=value' that hold for every training"),
    "--no-pictures": Option("pictures", "the table alone", "false"),
    "--angle-step": Option("angle_step", "degrees between arbitrary angles", text=False),
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
    config = plain(parse_config(default=CONFIG, argv=words, base="symmetry_comparison"))
    try:
        return with_runs(config)
    except UserError as error:
        fail(error)


def with_runs(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with `runs`: every model's training, or the file it is loaded from.

    UserError for a file that is not there, and for words that a run file does not know.
    """
    unknown = set(config["trained_on"]) - {UPRIGHT, TURNED}
    if unknown or not config["trained_on"]:
        raise UserError(f"trained_on is a list of {UPRIGHT}, {TURNED}; got {config['trained_on']}")
    models = {name: source for name, source in config["models"].items() if source}
    posthoc = config["posthoc"]
    if posthoc["of"] and posthoc["of"] not in models:
        raise UserError(
            f"posthoc.of is {posthoc['of']!r}{nearest(posthoc['of'], models)}; the "
            f"models are {', '.join(models)}"
        )
    runs: dict[str, Any] = {}
    for trained_on in config["trained_on"]:
        for name, source in models.items():
            label = name if trained_on == UPRIGHT else f"{name}_{TURNED}"
            run = _run(str(source), config, trained_on)
            if run is not None:
                runs[label] = run
                if isinstance(run, dict):
                    run["name"], run["output_dir"] = label, f"{config['output_dir']}/{label}"
    if not any(isinstance(run, dict) for run in runs.values()):
        raise UserError(
            "models names no run file: what is loaded needs one with its data beside it"
        )
    return {**config, RUNS: runs}


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


def _run(source: str, config: Mapping[str, Any], trained_on: str) -> Any:
    """A training's config; a path to load from, which is trained already, and so only upright."""
    run = compose_run(source, config)
    if not isinstance(run, dict):
        return run if trained_on == UPRIGHT else None
    if trained_on == TURNED:
        augmentation = run["recipe"]["augmentation"]
        run["recipe"]["augmentation"] = {
            "_target_": "evaluation.symmetry_comparison_views.RandomTurn",
            "augmentation": augmentation,
        }
    return run


def addable(word: str, file: str) -> str:
    """`models.NAME=FILE` may name a model that the config file does not have."""
    key = word.partition("=")[0]
    known = (CONFIGS / file).read_text()
    is_new = key.startswith("models.") and f"  {key.removeprefix('models.')}:" not in known
    return f"+{word}" if is_new else word
