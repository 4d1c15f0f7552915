"""Names of a symmetrised classifier's weights: ours, the published ones, those of a bare backbone.

model.*                                     the backbone, ours and published
aggregator.*                                ours: what the aggregator learnt
scoring_model.*, aggregation_model.*        the same, as published
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vit.weights import state_for

MODEL, AGGREGATOR = "model.", "aggregator."
PUBLISHED_AGGREGATORS = ("scoring_model.", "aggregation_model.")


def rename_state(
    state: Mapping[str, Tensor], model: nn.Module, *, learned: bool
) -> dict[str, Tensor]:
    """Weights in any of these spellings under our names; the caller checks them with the model.

    Those of a bare backbone must fit it exactly: ValueError as of `vit.keys.check_fit`.
    """
    wrapped = [
        name for name in state if name.startswith((MODEL, AGGREGATOR, *PUBLISHED_AGGREGATORS))
    ]
    if wrapped:
        return {_our_name(name): tensor for name, tensor in state.items()}
    if learned:
        raise ValueError(
            "these are the weights of a classifier alone, and its aggregator learns: give a file "
            "of the whole, or an aggregator without parameters"
        )
    return {f"{MODEL}{name}": tensor for name, tensor in _of_backbone(state, model).items()}


def _our_name(name: str) -> str:
    for prefix in PUBLISHED_AGGREGATORS:
        if name.startswith(prefix):
            return AGGREGATOR + name.removeprefix(prefix)
    return name


def _of_backbone(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    # Only our own exports contain an adapter's name for the net it wraps.
    net: Any = getattr(model, "net", None)
    prefix = "net." if isinstance(net, nn.Module) and not _named(state, "net.") else ""
    found = state_for(net if prefix else model, state)
    return {f"{prefix}{name}": tensor for name, tensor in found.items()}


def _named(state: Mapping[str, Tensor], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in state)
