"""The objects of a run: built from its config, or made by hand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from utils import distributed
from utils.checkpoints.checkpoint import Checkpoints
from utils.config.build import build
from utils.config.settings import check_max_steps
from utils.errors import UserError
from utils.randomness import seed_everything
from utils.recipe import Recipe, check_recipe
from utils.run_files import CHECKPOINTS
from utils.run_folder import BATCH


@dataclass
class Run:
    """What a run works with: its config, the objects it names, and what follows from these.

    `optimizer` makes the optimiser of groups of parameters. Raises UserError where
    `training.max_steps` or a number of `checkpoint` means nothing.
    """

    config: Mapping[str, Any]
    recipe: Recipe
    optimizer: Callable[..., torch.optim.Optimizer]
    data: Mapping[str, Any]
    probes: Mapping[str, Callable[..., dict[str, float]]]
    folder: Path = field(init=False)
    last_step: int = field(init=False)
    images_per_step: int = field(init=False)
    checkpoints: Checkpoints = field(init=False)

    def __post_init__(self) -> None:
        recipe, most = self.recipe, self.config["training"]["max_steps"]
        check_max_steps(most)
        self.folder = Path(self.config["output_dir"])
        self.last_step = recipe.total_steps if most is None else min(recipe.total_steps, most)
        micro_batch = recipe.batch_size_per_gpu * distributed.world_size()
        self.images_per_step = micro_batch * recipe.accumulation
        self.checkpoints = Checkpoints(
            self.folder / CHECKPOINTS,
            plan={"total_steps": recipe.total_steps, BATCH: self.images_per_step},
            **self.config["checkpoint"],
        )


def build_run(config: Mapping[str, Any]) -> Run:
    """Build what `config` names; UserError for what cannot be built or is not what it must be."""
    seed_everything(config["seed"])  # the same networks on every rank
    factories = {name: {**config[name], "_partial_": True} for name in ("recipe", "backbone")}
    built = build({"data": config["data"], **factories})
    data = {name: part for name, part in built["data"].items() if part is not None}
    for split in data.keys() & {"train", "val"}:
        if not hasattr(data[split], "read"):
            raise UserError(f"data.{split}: {config['data'][split]['_target_']} is no data set")
    recipe = built["recipe"](backbone=built["backbone"], dataset=data["train"])
    check_recipe(recipe)
    factories = {"optimizer": {**config["optimizer"], "_partial_": True}}
    built = build({"probes": config["probes"] or {}, **factories})
    probes = {name: probe for name, probe in built["probes"].items() if probe is not None}
    for name, probe in probes.items():
        if not callable(probe):
            raise UserError(f"probes.{name}: {config['probes'][name]['_target_']} is no probe")
    return Run(config, recipe, built["optimizer"], data, probes)
