"""Training steps of both recipes as the loop takes them, from the device's augmentation on."""

from functools import partial
from typing import Any

import torch
from timm.optim import Lamb
from torch import nn

from baselines.evit import EViT
from deit.augment import ThreeAugment
from deit.fast_augment import FastThreeAugment
from dinov2.fast_crops import FastMultiCrop
from tests.deit import tiny as deit
from tests.dinov2 import tiny as dinov2
from utils import parallel
from utils.optimizers import apply_schedules, clip_parts, make_optimizer

FAST_CROPS = {
    "global_crops_size": 16,
    "local_crops_size": 8,
    "local_crops_number": 2,
    "blur_kernel_size": 3,
}
CASES: dict[str, dict[str, Any]] = {
    f"{kind} {family}{which}": options | {"family": family}
    for kind, variants in {
        "dinov2": {
            "": {"drop_path_mode": "subset"},
            ", sinkhorn": {"centering": "sinkhorn_knopp"},
            ", fast crops": {"crops": FastMultiCrop(**FAST_CROPS)},
        },
        "deit": {
            "": {},
            ", cosub": {"cosub": True},
            ", cross entropy": {"loss": "ce", "smoothing": 0.1},
            ", fast augmentation": {"augmentation": FastThreeAugment(input_size=16)},
        },
    }.items()
    for which, options in variants.items()
    for family in (("hybrid",) if which else ("hybrid", "invariant", "plain"))
}
CASES |= {
    f"deit hybrid, {' '.join(net.values())}": {"family": "hybrid", "net": net}
    for net in (
        {"invariant": "max_filtering"},
        {"invariant": "canonization"},
        {"switch_basis": "regular"},
    )
}
# The recipe calls its `follow_training`.
EVIT = deit.make_backbone("plain", base_keep_rate=0.5, drop_loc=(1,), shrink_epochs=2).keywords
CASES["deit evit"] = {"backbone": partial(EViT, **EVIT)}


def make_case(name: str, device: str) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    """Recipe, optimiser and a batch on a device."""
    options = dict(CASES[name])
    module = dinov2 if name.startswith("dinov2") else deit
    net = options.pop("net", {}) | {"drop_path_mode": options.pop("drop_path_mode", "sample")}
    backbone = module.make_backbone(options.pop("family", "plain"), **net)
    options = {"backbone": backbone, "drop_path_rate": 0.4} | options
    recipe = module.make_recipe(**options).train()
    batch = parallel.to_device(_batch(recipe, module), torch.device(device))
    recipe.to(device)
    optimizers = {dinov2: torch.optim.AdamW, deit: lambda groups: Lamb(groups, eps=1e-8)}
    return recipe, make_optimizer(optimizers[module], recipe.param_groups(), recipe), batch


def _batch(recipe: nn.Module, module: Any) -> dict[str, Any]:
    if isinstance(getattr(recipe, "crops", None), FastMultiCrop) or isinstance(
        getattr(recipe, "augmentation", ThreeAugment), FastThreeAugment
    ):
        return next(recipe.batches(0))
    return module.make_batch(mixed=True) if module is deit else module.make_batch(recipe)


def take_steps(
    recipe: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Any], count: int
) -> None:
    """Schedules, augmentation, losses, backward, clipping, optimiser, averages: `count` times."""
    for step in range(count):
        apply_schedules(optimizer, recipe.schedules, step)
        recipe.losses(recipe.prepare(dict(batch)), step)["loss"].backward()
        clip_parts(recipe.clipped_parts(), 3.0)
        optimizer.step()
        recipe.after_step(step)
        optimizer.zero_grad(set_to_none=True)
