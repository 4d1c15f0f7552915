"""Train a small octic ViT and its plain twin with DINOv2 on real digits, and show what they learnt.

key=value words and flags hold for both trainings: recipe.epochs=2, output_dir=DIR, ...
"""

from typing import Any

from slurm.command import main
from utils.config.build import plain
from utils.config.compose import parse_config

RUNS = {"octic": "dinov2/quickstart.yaml", "plain": "dinov2/quickstart_plain.yaml"}


def parse(argv: list[str]) -> dict[str, Any]:
    """The configs of both trainings, and what the launcher reads."""
    configs = {name: plain(parse_config(file, argv)) for name, file in RUNS.items()}
    folder = configs["octic"]["output_dir"]
    for name, config in configs.items():
        config["output_dir"] = f"{folder}/{name}"
    shared = {key: configs["octic"][key] for key in ("name", "device", "launcher", "cluster")}
    return {**shared, "output_dir": folder, "runs": configs}


if __name__ == "__main__":
    main("evaluation.comparison.twins.compare", parse)
