"""Where metrics may go besides the run folder: wandb and TensorBoard, imported when asked for."""

import importlib
import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from utils.errors import UserError
from utils.metrics import Sink

# Module, key, package.
_WANDB = ("wandb", "logging.wandb", "wandb")
_TENSORBOARD = ("torch.utils.tensorboard", "logging.tensorboard", "tensorboard")


def make_sinks(
    folder: Path,
    *,
    name: str = "run",
    wandb: bool = False,
    wandb_project: str = "octic",
    tensorboard: bool = False,
    first_step: int = 0,
    config: dict[str, Any] | None = None,
) -> tuple[Sink, ...]:
    """Open the sinks asked for, on rank 0; raises UserError when their package is missing.

    `first_step`: where the run resumes; TensorBoard drops what an earlier start wrote after it.
    """
    sinks: list[Sink] = []
    if wandb:
        sinks.append(_wandb(folder, name, wandb_project, config or {}))
    if tensorboard:
        sinks.append(_tensorboard(folder, first_step))
    return tuple(sinks)


def check_sinks(*, wandb: bool = False, tensorboard: bool = False, **others: Any) -> None:
    """UserError where a package that `make_sinks` would need is missing; opens nothing."""
    if wandb:
        _import(*_WANDB)
    if tensorboard:
        _import(*_TENSORBOARD)


def _wandb(folder: Path, name: str, project: str, config: dict[str, Any]) -> Sink:
    wandb = _import(*_WANDB)
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
    except ValueError as error:  # pydantic's, of settings such as WANDB_MODE
        raise UserError(f"logging.wandb=true: {_settings_fault(error)}") from error
    id_file.write_text(f"{run_id}\n")
    return _until_lost(
        "Weights & Biases", lambda step, values: run.log(values, step=step), wandb.teardown
    )


def _settings_fault(error: ValueError) -> str:
    # pydantic names the setting and what it may be; W&B reads it from WANDB_<SETTING>.
    try:
        first = cast(Any, error).errors()[0]
        setting = str(first["loc"][0])
        what = f"{setting}={first['input']!r} (WANDB_{setting.upper()}): {first['msg']}"
    except (AttributeError, LookupError, TypeError):
        what = str(error)
    return " ".join(what.split())[:300]


def _until_lost(name: str, write: Sink, leave: Callable[[], None]) -> Sink:
    """A sink that is given up when it fails: the training is worth more.

    W&B's own process may be gone before ours: Slurm tells all processes of a job to end.
    TensorBoard's thread ends where the disk is full.
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
                f"note: {name} takes no more values ({what}): its curve ends before "
                f"step {step} until the next start; metrics.jsonl goes on",
                file=sys.stderr,
                flush=True,
            )
            with suppress(Exception):  # or it would fail, loudly, at the end of the process
                leave()

    return write_if_there


def _tensorboard(folder: Path, first_step: int) -> Sink:
    writer = _import(*_TENSORBOARD).SummaryWriter(str(folder), purge_step=first_step + 1)

    def write(step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return _until_lost("TensorBoard", write, writer.close)


def _import(module: str, key: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{key}=true needs the package {package}: pip install {package}") from error
