"""What a checkpoint consists of: recipe, optimiser, scaler, every rank's random numbers.

Each rank saves the shards it holds and reads those it needs, so a run may resume on another world
size or sharding.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from utils import distributed, layout
from utils.checkpoints.files import Parts
from utils.checkpoints.index import Stored, filled
from utils.errors import UserError
from utils.optimizers import load_optimizer_state, optimizer_state
from utils.precision import Precision
from utils.randomness import random_state, seed_everything, set_random_state


class Misfit(UserError):
    """A saved state that is of another model; `what` says in which tensors."""

    def __init__(self, source: str, what: str) -> None:
        super().__init__(f"{source} is of another model: {what}")
        self.what = what


def collect(
    recipe: nn.Module, optimizer: torch.optim.Optimizer, precision: Precision
) -> dict[str, Any]:
    """The parts of a checkpoint, tensors laid out as they are; every rank must call this."""
    return {
        "recipe": recipe.state_dict(),
        "optimizer": optimizer_state(optimizer, recipe),
        "progress": {
            "scaler": precision.state_dict(),
            "random": distributed.gather_objects(random_state()),
        },
    }


def restore(
    parts: Parts,
    recipe: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    *,
    seed: int,
    step: int,
) -> None:
    """Put the parts back as they were at `step`.

    On another world size the ranks' random numbers start from `seed` and `step`.
    """
    load_state(recipe, parts, str(parts.folder))
    _restore_optimizer(parts, recipe, optimizer)
    progress = parts["progress"]
    precision.load_state_dict(progress["scaler"])
    random = progress["random"]
    if len(random) == distributed.world_size():
        set_random_state(random[distributed.rank()])
    else:
        seed_everything(rank_seed(seed, step))


def whole_state(module: nn.Module) -> dict[str, Any]:
    """The state dict as whole CPU tensors on rank 0, empty ones elsewhere; all ranks must call."""
    return {name: layout.to_main(value.detach()) for name, value in module.state_dict().items()}


def load_state(module: nn.Module, parts: Parts, source: str) -> None:
    """Fill a module that may be sharded from the part `recipe`, strictly; `source` names it."""
    ours, saved = module.state_dict(), parts.outline("recipe")
    check_fits(ours, saved, source)
    parts.read({one.name: ours[name] for name, one in saved.items() if isinstance(one, Stored)})


def check_fits(ours: Mapping[str, Any], saved: Mapping[str, Any], source: str) -> None:
    """Misfit unless a saved state has the tensors of ours by name and shape; reads none of them."""
    missing, left_over = sorted(ours.keys() - saved.keys()), sorted(saved.keys() - ours.keys())
    wrong = [name for name in ours.keys() & saved.keys() if ours[name].shape != saved[name].shape]
    if missing or left_over or wrong:
        found = [
            f"{len(n)} {what}, e.g. {n[0]}"
            for n, what in ((missing, "missing"), (left_over, "left over"))
            if n
        ]
        found += [
            f"{n} is {list(saved[n].shape)}, not {list(ours[n].shape)}" for n in sorted(wrong)[:1]
        ]
        raise Misfit(source, "; ".join(found))


def rank_seed(seed: int, step: int = 0) -> int:
    """The seed of this rank's stream from a step on; networks are built with `seed` itself."""
    return (seed * 1_000_003 + step * 7_368_787 + distributed.rank() + 1) % 2**63


def _restore_optimizer(parts: Parts, recipe: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    # What has the shape of its parameter takes its layout, so that a rank reads its shard alone.
    saved, parameters = parts.outline("optimizer"), dict(recipe.named_parameters())
    targets: dict[str, Tensor] = {}
    for name, values in saved["state"].items():
        parameter = parameters.get(name)
        for one in values.values():
            if not isinstance(one, Stored):
                continue
            if parameter is not None and parameter.shape == one.shape:
                target = torch.empty_like(parameter, dtype=one.dtype, requires_grad=False)
            else:
                target = torch.empty(one.shape, dtype=one.dtype)
            targets[one.name] = target
    parts.read(targets)
    state = {name: filled(values, targets) for name, values in saved["state"].items()}
    load_optimizer_state(optimizer, recipe, {"state": state, "groups": saved["groups"]})
