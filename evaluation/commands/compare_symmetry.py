"""The command line of the comparison of symmetric nets: upright and turned trainings."""

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.commands.compared_runs import (
    RECIPE_OPTIONS,
    compose_run,
    parse_runs,
    with_trainings,
)
from utils.config.command_line import Option
from utils.config.trainings import RUNS
from utils.errors import UserError
from utils.nearest import nearest
from utils.ranges import check_distinct, check_words

CONFIG = "symmetry_comparison.yaml"
UPRIGHT, TURNED = "upright", "turned"

OPTIONS = {
    "--turned": Option(
        "trained_on", "train each model on turned digits as well", "[upright,turned]"
    ),
    "--train-heads": Option("posthoc.trained", "train the head under each aggregator", "head"),
    "--angle-step": Option("angle_step", "degrees between arbitrary angles", text=False),
    **RECIPE_OPTIONS,
}


def parse_comparison(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config a command line asks for, each run file composed; a mistake is one line, code 2."""
    return parse_runs(argv, CONFIG, OPTIONS, with_runs, _check)


def _check(config: Mapping[str, Any]) -> None:
    """UserError for what the run would refuse of its aggregators, around every net they wrap."""
    from evaluation.nets import constructor_of, weights_file  # late: it imports torch
    from evaluation.wrapped import check_wrapped

    for name in config["posthoc"]["of"]:
        run = config[RUNS][name]
        trained = isinstance(run, dict)
        backbone = run["backbone"] if trained else constructor_of(weights_file(str(run)))
        if backbone:  # files of others are refused when they are loaded
            check_wrapped(backbone, config["posthoc"])


def with_runs(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with `runs`: every model's training, or the file it is loaded from.

    `posthoc.of` becomes the list of the runs of that model. UserError for a file that is not there,
    for words that a run file does not know, and for two runs of one name.
    """
    check_words("trained_on", config["trained_on"], (UPRIGHT, TURNED))
    check_distinct("trained_on", config["trained_on"])
    models = {name: source for name, source in config["models"].items() if source}
    posthoc = config["posthoc"]
    if posthoc["of"] and posthoc["of"] not in models:
        raise UserError(
            f"posthoc.of is {posthoc['of']!r}{nearest(posthoc['of'], models)}; the "
            f"models are {', '.join(models)}"
        )
    runs: dict[str, Any] = {}
    wrapped: list[str] = []
    for trained_on in config["trained_on"]:
        for name, source in models.items():
            run = _run(str(source), config, trained_on)
            if run is None:
                continue
            named = name if trained_on == UPRIGHT else f"{name}_{TURNED}"
            if named in runs:
                raise UserError(f"models.{named} has the name of the turned {name}; rename it")
            runs[named] = run
            wrapped += [named] if name == posthoc["of"] else []
    return with_trainings(runs, {**config, "posthoc": {**posthoc, "of": wrapped}})


def _run(source: str, config: Mapping[str, Any], trained_on: str) -> Any:
    """A training's config, or a path to load from, which is for `trained_on` upright only; or None.

    A net to load is trained already, so it has no turned version.
    """
    run = compose_run(source, config)
    if not isinstance(run, dict):
        return run if trained_on == UPRIGHT else None
    if trained_on == TURNED:
        augmentation = run["recipe"]["augmentation"]
        run["recipe"]["augmentation"] = {
            "_target_": "utils.data.random_turns.RandomTurn",
            "augmentation": augmentation,
        }
    return run
