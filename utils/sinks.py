"""Where metrics may go besides the run folder: wandb and TensorBoard, imported when asked for."""

import importlib
import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.metrics import Sink


def make_sinks(
    folder: Path,
    *,
    name: str = "run",
    wandb: bool = False,
    wandb_project: str = "octic",
    tensorboard: bool = False,
    config: dict[str, Any] | None = None,
) -> tuple[Sink, ...]:
    """Open the sinks asked for, on rank 0; raises UserError when their package is missing."""
    sinks: list[Sink] = []
    if wandb:
        sinks.append(_wandb(folder, name, wandb_project, config or {}))
    if tensorboard:
        sinks.append(_tensorboard(folder))
    return tuple(sinks)


def _wandb(folder: Path, name: str, project: str, config: dict[str, Any]) -> Sink:
    wandb = _import("wandb", "logging.wandb", "wandb")
    # The run's id lives in the folder, so that a resumed or requeued job continues the same curve.
    id_file = folder / "wandb_id.txt"
    run_id = id_file.read_text().strip() if id_file.exists() else uuid.uuid4().hex[:8]
    place = str(folder.resolve())
    try:
        run = wandb.init(
            project=project, name=name, id=run_id, resume="allow", dir=place, config=config
        )
    except wandb.errors.Error as error:
        what = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"logging.wandb=true: {what}; or set WANDB_MODE=offline and `wandb sync` later"
        ) from error
    id_file.write_text(f"{run_id}\n")
    return _until_lost(lambda step, values: run.log(values, step=step), wandb.teardown)


def _until_lost(write: Sink, leave: Callable[[], None]) -> Sink:
    """A sink of W&B that is given up when it fails: the training is worth more.

    W&B's own process may be gone before ours: Slurm tells all processes of a job to end.
    """
    lost = False

    def write_if_there(step: int, values: dict[str, float]) -> None:
        nonlocal lost
        if lost:
            return
        try:
            write(step, values)
        except Exception as error:
            lost = True
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            print(
                f"note: Weights & Biases takes no more values ({what}): its curve ends before "
                f"step {step} until the next start; metrics.jsonl goes on",
                file=sys.stderr,
                flush=True,
            )
            with suppress(Exception):  # or it would fail, loudly, at the end of the process
                leave()

    return write_if_there


def _tensorboard(folder: Path) -> Sink:
    writer = _import("torch.utils.tensorboard", "logging.tensorboard", "tensorboard").SummaryWriter(
        str(folder)
    )

    def write(step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return write


def _import(module: str, key: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{key}=true needs the package {package}: pip install {package}") from error
