"""What `training`, `checkpoint` and the rest outside of any constructor may say."""

from collections.abc import Mapping
from typing import Any

from utils.distributed import check_device
from utils.errors import UserError
from utils.parallel import SHARDINGS
from utils.precision import check_mode
from utils.ranges import OutOfRange, check_count, check_range

# Least whole numbers by section.
_COUNTS = {
    "training": {"nan_patience": 1, "log_every": 1},
    "checkpoint": {"every": 0, "keep_last": 1, "keep_every": 0},
}


def check_settings(config: Mapping[str, Any]) -> None:
    """UserError for a value without a meaning in a training's config, as far as nothing is built.

    A run asks this before it begins, and so do `--check` and whoever submits it. A saved config may
    lack newer keys.
    """
    try:
        for section, counts in _COUNTS.items():
            for key, least in counts.items():
                check_count(f"{section}.{key}", config[section].get(key, least), least)
        check_count("probe_every", config.get("probe_every", 0))
        check_count("seed", config.get("seed", 0))
        training = config["training"]
        for key in ("clip_grad", "hang_timeout_s"):
            check_range(f"training.{key}", training.get(key) or 0)
    except OutOfRange as error:
        raise UserError(str(error)) from None
    check_max_steps(training.get("max_steps"))
    check_mode(training["precision"])
    check_device(config.get("device", "auto"))
    if training["sharding"] not in SHARDINGS:
        raise UserError(
            f"training.sharding={training['sharding']} is unknown; choose {', '.join(SHARDINGS)}"
        )


def check_max_steps(most: Any) -> None:
    """UserError unless `training.max_steps` is null or counts steps."""
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise UserError(f"training.max_steps must be a whole number from 1, or null, got {most!r}")
