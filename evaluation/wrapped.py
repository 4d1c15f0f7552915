"""A classifier under every aggregator of a config: to judge it, or to check the config alone."""

import copy
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from evaluation.nets import build_net, complete
from utils.config.build import build
from utils.errors import UserError

SOME_CLASSES: Any = SimpleNamespace(class_names=["one", "other"])  # in place of a data set


def wrap_all(classifier: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """The classifier under every aggregator, untrained; UserError for one that does not fit it."""
    for key in ("wrapper", "training"):  # the latter, which is built elsewhere, would fail late
        if not isinstance(config[key], Mapping):
            raise UserError(f"{key} must be {{_target_: ...}}, not {config[key]!r}")
    wrapped: dict[str, Any] = {}
    names = config["aggregators"]
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise UserError(f"aggregators must be a list of names, not {names!r}")
    for name in names:
        trained = config["trained"]
        backbone = classifier if trained == "none" else copy.deepcopy(classifier)
        net = build({**config["wrapper"], "aggregator": name}, backbone=backbone, trained="none")
        # An untrained learned aggregator would give noise.
        if net.aggregator.learned and trained == "none":
            trained = "aggregator"
        try:
            net.set_trained(trained)
        except ValueError as error:
            raise UserError(str(error)) from None
        wrapped[name] = net
    return wrapped


def check_wrapped(backbone: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """UserError for a wrapper, an aggregator or a training of them that the run would refuse.

    All are built around the net of a backbone node, on the meta device.
    """
    with torch.device("meta"):
        build(config["training"])
        wrap_all(build_net(complete(backbone, {}, None, SOME_CLASSES)), config)
