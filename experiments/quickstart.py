"""Train a small octic ViT and its plain twin with DINOv2 on real digits, and show what they learnt.

key=value words and flags hold for both trainings: recipe.epochs=2, output_dir=DIR, ...
"""

from typing import Any

from slurm.command import main
from utils.config.build import plain
from utils.config.compose import parse_config
from utils.config.trainings import in_folders

RUNS = {"octic": "dinov2/quickstart.yaml", "plain": "dinov2/quickstart_plain.yaml"}


def parse(argv: list[str]) -> dict[str, Any]:
    """The configs of both trainings, and what the launcher reads."""
    configs = {name: plain(parse_config(file, argv)) for name, file in RUNS.items()}
    keys = ("name", "output_dir", "device", "launcher", "cluster")
    return in_folders({**{key: configs["octic"][key] for key in keys}, "runs": configs})


if __name__ == "__main__":
    main("evaluation.comparison.twins.compare", parse)
