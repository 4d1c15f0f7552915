"""The settings of a comparison of costs: the checked config, with the device's defaults."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from evaluation.cost.cross_check import require_fvcore
from evaluation.cost.peaks import has_bfloat16
from evaluation.cost.timing import PASSES
from utils.errors import UserError
from utils.ranges import check_count, check_path, check_words

# A batch of 64, 10 warm-ups and 100 timed steps, as published; on a CPU values that take minutes.
# There the first two steps touch memory that later ones reuse: the first takes half as long again.
DEFAULTS = {"batch_size": 64, "steps": 100, "warmup": 10, "rounds": 5}
CPU_DEFAULTS = {"batch_size": 1, "steps": 3, "warmup": 2, "rounds": 3}
PICTURES = (".png", ".pdf", ".svg")
HEIGHTS = ("throughput", "accuracy")


class Settings(NamedTuple):
    """The protocol of the measurement."""

    device: torch.device
    batch_size: int
    size: int | None  # pixels a side; None: each net's own
    steps: int  # timed, over all rounds
    rounds: int
    warmup: int
    dtype: torch.dtype | None  # of autocast
    compile: bool
    graphs: bool  # CUDA graphs
    passes: tuple[str, ...]
    seed: int
    defaulted: tuple[str, ...]  # keys that the device chose

    @property
    def mode(self) -> str:
        """How steps are run, in words."""
        return ("compiled" if self.compile else "eager") + (" + CUDA graphs" if self.graphs else "")


def read_settings(config: Mapping[str, Any], device: torch.device) -> Settings:
    """The settings of a config of configs/complexity.yaml; UserError for invalid values."""
    defaults = CPU_DEFAULTS if device.type == "cpu" else DEFAULTS
    defaulted = tuple(key for key in defaults if config[key] is None)
    values = {**defaults, **{key: config[key] for key in defaults if config[key] is not None}}
    for key, value in values.items():
        check_count(key, value, 0 if key == "warmup" else 1)
    if config["size"] is not None:
        check_count("size", config["size"], 1)
    if config["passes"] != []:  # then nothing is timed
        check_words("passes", config["passes"], PASSES)
    if config["graphs"] and device.type != "cuda":
        raise UserError(f"--graphs needs a CUDA device: {device.type} has no CUDA graphs")
    if config["graphs"] and config.get("table"):
        raise UserError("--graphs is not for --table: shapes within its rows depend on the images")
    values["rounds"] = min(values["rounds"], values["steps"])
    return Settings(
        device=device,
        size=config["size"],
        dtype=torch.bfloat16 if config["amp"] and has_bfloat16(device) else None,
        compile=config["compile"],
        graphs=config["graphs"],
        passes=tuple(word for word in PASSES if word in config["passes"]),
        seed=config["seed"],
        defaulted=defaulted,
        **values,
    )


def choose_device(name: str) -> str:
    """The name of the device; `auto` becomes mps if only that is there. UserError if unknown."""
    if name == "auto" and not torch.cuda.is_available() and torch.backends.mps.is_available():
        return "mps"
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps, but torch sees no GPU of Apple's here; use device=auto")
    if name != "auto":
        try:
            torch.device(str(name))
        except RuntimeError:
            raise UserError(f"device is auto, cpu, cuda or mps, not {name!r}") from None
    return name


def check_outputs(config: Mapping[str, Any]) -> None:
    """UserError before the measurement for output files that could not be written after it."""
    if config["picture_y"] not in HEIGHTS:
        raise UserError(f"picture_y is {' or '.join(HEIGHTS)}, not {config['picture_y']!r}")
    for key in ("json_file", "picture_file"):
        if config[key] is None:
            continue
        check_path(key, config[key])
        path = Path(config[key])
        if path.is_dir():
            raise UserError(f"{key}={path} is a folder; give the name of a file")
        if key == "picture_file" and path.suffix not in PICTURES:
            raise UserError(f"{key}={path} must end in {', '.join(PICTURES)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{key}={path}: cannot make its folder: {error.strerror}") from None
    if config["fvcore"]:
        require_fvcore()
    needed = config["picture_file"] and config["picture_y"] == "throughput"
    if needed and not config["passes"]:
        raise UserError(
            "a picture of throughput needs a pass to be measured; "
            "--picture-y accuracy draws the published top-1 without one"
        )


def whole_numbers(flag: str, text: str) -> list[int]:
    """Parse a list such as 2,4 of numbers from 1; a UserError names the flag."""
    numbers = [int(word) for word in text.split(",") if word.isdecimal() and int(word) > 0]
    if len(numbers) != len(text.split(",")):
        raise UserError(f"{flag} takes numbers such as 2,4, not {text!r}")
    return numbers
