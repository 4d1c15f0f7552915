"""The trainings of a config that is made of several, such as a comparison's."""

from collections.abc import Mapping
from typing import Any

RUNS = "runs"  # name -> a training's config, or a path to load a net from


def in_folders(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with every training in its own folder of the run folder.

    To be called again where the run folder is settled: a point of a sweep has its own, and a job's
    has its id.
    """
    folder = config["output_dir"]
    return {
        **config,
        RUNS: {
            name: {**run, "output_dir": f"{folder}/{name}"} if isinstance(run, Mapping) else run
            for name, run in config[RUNS].items()
        },
    }


def trainings(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The trainings by name, each in its folder; none of a config without `runs`."""
    runs = in_folders(config)[RUNS] if config.get(RUNS) else {}
    return {name: run for name, run in runs.items() if isinstance(run, dict)}
