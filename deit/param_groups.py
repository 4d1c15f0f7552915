"""Which parameters train, which decay, and at what share of the learning rate."""

import re
from collections.abc import Iterator
from typing import Any

from timm.optim import param_groups_layer_decay
from torch import nn

from utils.ranges import check_word

TRAINABLE = ("all", "attention", "head")
_ATTENDS = re.compile(r"attn\d*|pos_embed")  # attn and attn1 of blocks in parallel


def undecayed(model: nn.Module) -> set[str]:
    """Names without weight decay: vectors, biases, and what the model's `no_weight_decay()` says.

    Norms' gains and layer scales, octic or plain, are vectors.
    """
    named = {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in model.named_modules()
        if hasattr(part, "no_weight_decay")
        for name in part.no_weight_decay()
    }
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim <= 1 or name.endswith(".bias") or name in named
    }


def param_groups(
    model: nn.Module, *, layerwise_decay: float = 1.0, decay_vectors: bool = False
) -> list[dict[str, Any]]:
    """Optimiser groups of the trainable parameters, as the loop expects them.

    layerwise_decay: the learning rate of a layer is this times that of the layer above it.
    decay_vectors: weight decay for all parameters, also those of `undecayed`.
    """
    exempt = set() if decay_vectors else undecayed(model)
    if layerwise_decay != 1.0:
        net = model if hasattr(model, "group_matcher") else getattr(model, "net", model)
        if not hasattr(net, "group_matcher"):
            raise ValueError(
                f"layerwise_decay needs a model with timm's group_matcher, which "
                f"{type(net).__name__} has not"
            )
        prefix = "" if net is model else "net."
        names = {name.removeprefix(prefix) for name in exempt}
        groups = param_groups_layer_decay(
            net, weight_decay=1.0, no_weight_decay_list=names, layer_decay=layerwise_decay
        )
        return [
            {
                "params": group["params"],
                "lr_multiplier": group["lr_scale"],
                "weight_decay_multiplier": 1.0 if decay_vectors else group["weight_decay"],
            }
            for group in groups
        ]
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in named if n in exempt], "weight_decay_multiplier": 0.0},
        {"params": [p for n, p in named if n not in exempt], "weight_decay_multiplier": 1.0},
    ]


def freeze(model: nn.Module, trainable: str) -> None:
    """Let only a part of the model train.

    all: what the model has not frozen itself; head: the classifier alone; attention: attention
    layers, classifier and positions (Touvron et al. 2022, "Three things everyone should know about
    Vision Transformers").
    """
    check_word("trainable", trainable, TRAINABLE)
    if trainable != "all":
        kept = set(_kept(model, trainable))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in kept)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"trainable={trainable} leaves {type(model).__name__} nothing to train")


def _kept(model: nn.Module, trainable: str) -> Iterator[str]:
    net = model if hasattr(model, "get_classifier") else getattr(model, "net", model)
    classifier = net.get_classifier() if hasattr(net, "get_classifier") else None
    head = {id(p) for p in classifier.parameters()} if isinstance(classifier, nn.Module) else set()
    for name, parameter in model.named_parameters():
        attends = any(_ATTENDS.fullmatch(part) for part in name.split("."))
        if id(parameter) in head or (trainable == "attention" and attends):
            yield name
