"""Stands for Weights & Biases: notes in the run folder which id each start continues."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

util = SimpleNamespace(generate_id=lambda: "first-id")


def init(*, id: str, dir: str, **_: Any) -> SimpleNamespace:
    with (Path(dir) / "wandb_inits.txt").open("a") as file:
        file.write(f"{id}\n")
    return SimpleNamespace(log=lambda values, step: None)
