"""What a checkpoint consists of: recipe, optimiser, scaler, every rank's random numbers.

Tensors are saved whole, so a run may resume on another world size or sharding.
"""

from typing import Any

import torch
from torch import nn

from utils import distributed, parallel
from utils.errors import UserError
from utils.optimizers import load_optimizer_state, optimizer_state
from utils.precision import Precision
from utils.randomness import random_state, seed_everything, set_random_state


def collect(
    recipe: nn.Module, optimizer: torch.optim.Optimizer, precision: Precision
) -> dict[str, Any]:
    """The parts of a checkpoint, whole on rank 0; every rank must call this."""
    return {
        "recipe": whole_state(recipe),
        "optimizer": optimizer_state(optimizer, recipe),
        "progress": {
            "scaler": precision.state_dict(),
            "random": distributed.gather_objects(random_state()),
        },
    }


def restore(
    parts: dict[str, Any],
    recipe: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    *,
    seed: int,
) -> None:
    """Put the parts back; on another world size the ranks' random numbers start from `seed`."""
    load_state(recipe, parts["recipe"], "the checkpoint")
    load_optimizer_state(optimizer, recipe, parts["optimizer"])
    precision.load_state_dict(parts["progress"]["scaler"])
    random = parts["progress"]["random"]
    if len(random) == distributed.world_size():
        set_random_state(random[distributed.rank()])
    else:
        seed_everything(rank_seed(seed))


def whole_state(module: nn.Module) -> dict[str, Any]:
    """The state dict as whole CPU tensors on rank 0, empty ones elsewhere; all ranks must call."""
    return {name: parallel.to_main(value.detach()) for name, value in module.state_dict().items()}


@torch.no_grad()
def load_state(module: nn.Module, state: dict[str, Any], source: str) -> None:
    """Load whole tensors, strictly, into a module that may be sharded; `source` names them."""
    ours = module.state_dict()
    missing, left_over = sorted(ours.keys() - state.keys()), sorted(state.keys() - ours.keys())
    wrong = [name for name in ours.keys() & state.keys() if ours[name].shape != state[name].shape]
    if missing or left_over or wrong:
        found = [
            f"{len(n)} {what}, e.g. {n[0]}"
            for n, what in ((missing, "missing"), (left_over, "left over"))
            if n
        ]
        found += [
            f"{n} is {list(state[n].shape)}, not {list(ours[n].shape)}" for n in sorted(wrong)[:1]
        ]
        raise UserError(f"{source} is of another model: {'; '.join(found)}")
    for name, target in ours.items():
        target.copy_(parallel.shard_like(state[name], target))


def rank_seed(seed: int) -> int:
    """The seed of this rank's stream; networks are built with `seed` itself, alike on all."""
    return (seed * 1_000_003 + distributed.rank() + 1) % 2**63
