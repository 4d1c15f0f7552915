"""Parameter groups to optimiser, schedules applied step by step, clipping per part."""

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import layout
from utils.errors import UserError
from utils.ranges import check_range
from utils.schedules import Schedule


def make_optimizer(
    factory: Callable[..., torch.optim.Optimizer], groups: list[dict[str, Any]], recipe: nn.Module
) -> torch.optim.Optimizer:
    """Build the optimiser of a recipe's `groups` (see `utils.recipe.Recipe.param_groups`).

    torch's Adam and AdamW are fused, on a CPU too, unless they are told `fused` or `foreach`.
    Raises UserError when a trainable parameter of `recipe` is in no group or in two, for groups
    that are empty or hold another's parameters, and for options without a meaning.
    """
    defaults = {"lr_schedule": "lr", "lr_multiplier": 1.0, "weight_decay_multiplier": 1.0}
    groups = [{**defaults, **group, "params": list(group["params"])} for group in groups]
    counts = Counter(id(parameter) for group in groups for parameter in group["params"])
    wrong = [n for n, p in recipe.named_parameters() if p.requires_grad and counts[id(p)] != 1]
    if wrong:
        raise UserError(
            f"{len(wrong)} trainable parameters are not in exactly one parameter group, "
            f"e.g. {', '.join(wrong[:3])}"
        )
    own = {id(parameter) for parameter in recipe.parameters()}
    if foreign := counts.keys() - own:  # no checkpoint would hold them
        raise UserError(
            f"{len(foreign)} of the {len(counts)} parameters in the parameter groups are not the "
            "recipe's own; make what they belong to one of its submodules"
        )
    if not counts:
        raise UserError("there is nothing to train: the parameter groups hold no parameter")
    optimizer = factory([group for group in groups if group["params"]])
    _check_options(optimizer.defaults)
    _fuse(optimizer)
    return optimizer


def _check_options(options: Mapping[str, Any]) -> None:
    """UserError for betas, momentum or eps out of range: not all optimisers check them."""
    for value in options.get("betas") or ():
        check_range("optimizer.betas", value, 0, 1, ends="[)")
    check_range("optimizer.momentum", options.get("momentum") or 0.0, 0, 1, ends="[)")
    eps = options.get("eps")
    for value in eps if isinstance(eps, Sequence) else [eps]:  # Adafactor has two
        check_range("optimizer.eps", value or 0.0)


def _fuse(optimizer: torch.optim.Optimizer) -> None:
    """Use torch's fused Adam unless the config chose `fused` or `foreach`."""
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        chosen = group["fused"] is not None or group["foreach"] is not None
        kinds = {(p.device.type, p.is_floating_point()) for p in group["params"]}
        fits = kinds in ({("cuda", True)}, {("cpu", True)})
        if fits and not chosen and not group["differentiable"]:
            # Per group, not by keyword: then GradScaler keeps skipping steps with inf by itself.
            group["fused"] = True


def apply_schedules(
    optimizer: torch.optim.Optimizer, schedules: Mapping[str, Schedule], step: int
) -> dict[str, float]:
    """Set lr and weight decay of every group for `step`; returns all schedules' values."""
    values = {name: float(schedule(step)) for name, schedule in schedules.items()}
    for group in optimizer.param_groups:
        group["lr"] = values[group["lr_schedule"]] * group["lr_multiplier"]
        group["weight_decay"] = values.get("weight_decay", 0.0) * group["weight_decay_multiplier"]
    return values


@torch.no_grad()
def clip_parts(parts: Mapping[str, nn.Module], max_norm: float | None = None) -> dict[str, Tensor]:
    """Scale each part's gradients by min(1, max_norm / (norm + 1e-6)); returns the norms before.

    `max_norm` None or 0 only measures. One reduction for all parts where gradients are sharded;
    every rank must call.
    """
    gradients = {
        name: [p.grad for p in part.parameters() if p.grad is not None]
        for name, part in parts.items()
    }
    norms = _norms(gradients)
    if max_norm:
        for name, norm in norms.items():
            if gradients[name]:
                scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
                torch._foreach_mul_([layout.local(g) for g in gradients[name]], scale)
    return norms


def optimizer_state(optimizer: torch.optim.Optimizer, recipe: nn.Module) -> dict[str, Any]:
    """The optimiser's state by parameter name, tensors laid out as they are.

    Names instead of positions: the state then survives another order, world size or sharding.
    """
    names = {id(p): name for name, p in recipe.named_parameters()}
    state = {names[id(p)]: dict(values) for p, values in optimizer.state.items()}
    groups = [
        {
            **{k: _plain(v) for k, v in g.items() if k != "params"},
            "params": [names[id(p)] for p in g["params"]],
        }
        for g in optimizer.param_groups
    ]
    return {"state": state, "groups": groups}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, recipe: nn.Module, saved: dict[str, Any]
) -> None:
    """Put back what `optimizer_state` returned; raises UserError if it is of other parameters.

    Whole tensors take the layout of their parameter.
    """
    parameters = dict(recipe.named_parameters())
    ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
    expected = {name for name, p in parameters.items() if id(p) in ours}
    stored = {name for group in saved["groups"] for name in group["params"]}
    if expected != stored:
        odd = sorted(expected ^ stored)
        raise UserError(
            f"the checkpoint's optimiser has other parameters than this run ({len(odd)} differ, "
            f"e.g. {odd[0]}); the model or what is frozen has changed: use another output_dir"
        )
    plain = optimizer.state_dict()
    positions = {}
    gained = {name: group for group in saved["groups"] for name in group["params"]}
    names = {id(p): name for name, p in parameters.items()}
    for group, packed in zip(optimizer.param_groups, plain["param_groups"], strict=True):
        # Keys that a new optimiser lacks were added while training (LAMB's `step`).
        counted = gained[names[id(group["params"][0])]]
        packed.update({k: v for k, v in counted.items() if k not in packed})
        positions.update(
            {id(p): index for p, index in zip(group["params"], packed["params"], strict=True)}
        )
    plain["state"] = {
        positions[id(parameters[name])]: {
            k: layout.shard_like(v, parameters[name]) if isinstance(v, Tensor) else v
            for k, v in values.items()
        }
        for name, values in saved["state"].items()
    }
    _check_memory(optimizer, parameters, saved["state"])
    optimizer.load_state_dict(plain)


def _check_memory(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], saved: dict[str, Any]
) -> None:
    """UserError where the saved optimiser lacks state that a step of this one needs."""
    if not saved:
        return
    name = min(saved, key=lambda one: parameters[one].numel())
    lacks = _memory(optimizer, parameters[name]) - saved[name].keys()
    if lacks:
        raise UserError(
            f"the checkpoint is of another optimiser than optimizer._target_ and its keywords say: "
            f"it has no {', '.join(sorted(lacks))}; go on with the run's own, or choose another "
            "output_dir"
        )


def _memory(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> set[str]:
    """Keys of an optimiser's state per parameter, found by a step of a copy on zeros."""
    zeros = nn.Parameter(torch.zeros(parameter.shape, device=layout.local(parameter).device))
    zeros.grad = torch.zeros_like(zeros)
    tried = copy.copy(optimizer)
    tried.state = defaultdict(dict)
    tried.param_groups = [{**optimizer.param_groups[0], "params": [zeros]}]
    try:
        tried.step()
    except Exception:  # an optimiser that needs more than this is not checked
        return set()
    return {key for key, value in tried.state[zeros].items() if value is not None}


def _norms(gradients: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    # Sums of squares: of whole gradients, and of sharded ones, which are reduced over the ranks.
    device = next((g.device for part in gradients.values() for g in part), torch.device("cpu"))
    groups = [
        g for part in gradients.values() for g in map(layout.shard_group, part) if g is not None
    ]

    def squares(sharded: bool) -> Tensor:
        totals = []
        for part in gradients.values():
            pieces = [
                layout.local(g) for g in part if (layout.shard_group(g) is not None) == sharded
            ]
            pieces = [piece for piece in pieces if piece.numel()]
            if pieces:
                norms = torch.stack(torch._foreach_norm(pieces))
                totals.append(
                    norms.to(torch.promote_types(norms.dtype, torch.float32)).square().sum()
                )
            else:
                totals.append(torch.zeros((), device=device))
        return torch.stack(totals) if totals else torch.zeros(0, device=device)

    total = squares(sharded=False)
    if groups:
        split = squares(sharded=True)
        dist.all_reduce(split, group=groups[0])
        total = total + split
    return dict(zip(gradients, total.sqrt().unbind(), strict=True))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
