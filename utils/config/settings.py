"""Checks of `training`, `checkpoint` and other config keys that no constructor checks."""

from collections.abc import Mapping
from typing import Any

from utils.errors import UserError
from utils.joining import check_device
from utils.parallel import check_sharding
from utils.precision import check_mode
from utils.ranges import check_count, check_range

# Least whole numbers by section.
_COUNTS = {
    "training": {"nan_patience": 1, "log_every": 1},
    "checkpoint": {"every": 0, "keep_last": 1, "keep_every": 0},
}


def check_settings(config: Mapping[str, Any]) -> None:
    """UserError for a value that makes no sense in a training config; builds nothing.

    Runs at the start of a training, with `--check` and before a job is submitted. A saved config
    may lack newer keys.
    """
    _check_parts(config)
    for section, counts in _COUNTS.items():
        for key, least in counts.items():
            check_count(f"{section}.{key}", config[section].get(key, least), least)
    check_count("probe_every", config.get("probe_every", 0))
    check_count("seed", config.get("seed", 0))
    check_range("seed", config.get("seed", 0), 0, 2**63 - 1)  # torch takes no more
    training = config["training"]
    for key in ("clip_grad", "hang_timeout_s"):
        check_range(f"training.{key}", training.get(key) or 0)
    check_max_steps(training.get("max_steps"))
    check_mode(training["precision"])
    check_device(config.get("device", "auto"))
    check_sharding(training["sharding"])


def _check_parts(config: Mapping[str, Any]) -> None:
    """UserError if a part of a training is missing or is not a node with a `_target_`."""
    for name in ("recipe", "backbone", "optimizer", "data"):
        if not config[name]:
            raise UserError(f"{name} must be given, not {config[name]!r}")
    data, probes = config["data"], config.get("probes") or {}
    if data.get("train") is None:
        raise UserError("data.train must be given: a data set, which is a _target_ with keywords")
    nodes = {f"data.{split}": ("a data set", data.get(split)) for split in ("train", "val")}
    nodes |= {f"probes.{name}": ("a probe", node) for name, node in probes.items()}
    for key, (what, node) in nodes.items():
        if node is not None and not (isinstance(node, Mapping) and "_target_" in node):
            raise UserError(
                f"{key} must be {what}, which is a _target_ with keywords, or null, not {node!r}"
            )
    for key in config["optimizer"].keys() & {"lr", "weight_decay"}:
        raise UserError(
            f"optimizer.{key} has no effect, as a schedule sets it at every step: "
            f"say recipe.schedules.{key}"
        )


def check_max_steps(most: Any) -> None:
    """UserError unless `training.max_steps` is null or a whole number from 1."""
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise UserError(f"training.max_steps must be a whole number from 1, or null, got {most!r}")
