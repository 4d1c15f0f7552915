"""Which learning rate and weight decay each parameter gets: layer-wise decay, undecayed vectors.

Two groupings. The default goes by what a parameter is and where it stands in the network. The
published one goes by substrings of names and is kept for comparison; its faults: octic layer
scales (`ls*.alpha_*`) are decayed where plain ones (`ls*.gamma`) are not, and `invariant_proj`,
which stands in the middle of the network, learns at the full rate.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

EMBEDDINGS = ("pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens")


class Multipliers(NamedTuple):
    """What a parameter's learning rate and weight decay are multiplied with."""

    lr: float
    weight_decay: float
    is_last_layer: bool


def param_groups(
    parts: Mapping[str, nn.Module],
    *,
    layerwise_decay: float = 0.9,
    patch_embed_lr_multiplier: float = 0.2,
    published: bool = False,
) -> list[dict[str, Any]]:
    """Optimiser groups of the student's parts; parameters of equal multipliers share a group.

    Each is {params, lr_schedule, lr_multiplier, weight_decay_multiplier}, as the loop expects them.
    Frozen parameters are left out.
    """
    groups: dict[tuple[str, Multipliers], dict[str, Any]] = {}
    for name, part in parts.items():
        found = multipliers(
            part,
            layerwise_decay=layerwise_decay,
            patch_embed_lr_multiplier=patch_embed_lr_multiplier,
            published=published,
        )
        for parameter_name, parameter in part.named_parameters():
            if parameter_name not in found:
                continue
            lr, weight_decay, is_last = key = found[parameter_name]
            group = groups.setdefault(
                (name, key),
                {
                    "params": [],
                    "lr_schedule": "last_layer_lr" if is_last else "lr",
                    "lr_multiplier": lr,
                    "weight_decay_multiplier": weight_decay,
                },
            )
            group["params"].append(parameter)
    return list(groups.values())


def multipliers(
    part: nn.Module,
    *,
    layerwise_decay: float = 0.9,
    patch_embed_lr_multiplier: float = 0.2,
    published: bool = False,
) -> dict[str, Multipliers]:
    """Multipliers of every trainable parameter of a backbone (it has `blocks`) or a head."""
    find_layer = _layer_by_name if published else _layer_by_place
    decays = _decays_by_name if published else _decays_by_shape
    depth = len(part.blocks) if hasattr(part, "blocks") else None
    result = {}
    for name, parameter in part.named_parameters():
        if not parameter.requires_grad:
            continue
        lr = 1.0
        if depth is not None:
            lr = layerwise_decay ** (depth + 1 - find_layer(name, part, depth))
            lr *= patch_embed_lr_multiplier if name.startswith("patch_embed.") else 1.0
        weight_decay = 1.0 if decays(name, parameter) else 0.0
        result[name] = Multipliers(lr, weight_decay, "last_layer." in name)
    return result


def _layer_by_place(name: str, backbone: nn.Module, depth: int) -> int:
    """0 for what makes tokens of the image, i + 1 for block i, depth + 1 for what comes after.

    A module between two blocks (what an octic model does at its switch) counts with the block
    before it.
    """
    child, _, rest = name.partition(".")
    if child == "blocks":
        return int(rest.split(".")[0]) + 1
    owner = getattr(backbone, child)
    if child == "patch_embed" or not isinstance(owner, nn.Module):
        return 0
    if isinstance(owner, nn.ParameterList):  # an octic model's positions
        return 0
    if child not in ("norm", "head") and hasattr(backbone, "switch"):
        return backbone.switch
    return depth + 1


def _decays_by_shape(name: str, parameter: nn.Parameter) -> bool:
    """Biases, gains of norms and layer scales, octic or plain, are vectors; the rest decays."""
    return parameter.ndim > 1


def _layer_by_name(name: str, backbone: nn.Module, depth: int) -> int:
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return 0 if any(word in name for word in EMBEDDINGS) else depth + 1


def _decays_by_name(name: str, parameter: nn.Parameter) -> bool:
    return not (name.endswith(".bias") or "norm" in name or "gamma" in name)
