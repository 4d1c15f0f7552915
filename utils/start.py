"""Load what a run starts from: its own last checkpoint, or `training.weights`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.checkpoints import state
from utils.checkpoints.checkpoint import Checkpoints
from utils.checkpoints.files import DESCRIPTION, Parts
from utils.errors import UserError
from utils.precision import Precision
from utils.run_files import CHECKPOINTS, CONFIG, EXPORTED, FORMERLY, IN_HUB
from utils.run_folder import changed_keys, refuse_overwriting, saved_config

MOST_CHANGES = 4  # changed keys that an error names


def load_weights(recipe: nn.Module, path: str) -> list[str]:
    """Start from a run folder, one of its checkpoints, or a file that the recipe can read.

    From a run folder the whole state of the recipe is loaded; where that is of another recipe or
    network, only its exported network. Returns lines for the log. Raises UserError for what cannot
    be read, for weights that are not finite, and for tensors that are missing or left over.
    """
    try:
        return _load(recipe, path)
    except OSError as error:
        where = error.filename or path
        raise UserError(f"training.weights: cannot read {where}: {error.strerror}") from None


def restore(
    parts: Parts,
    recipe: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    *,
    config: Mapping[str, Any],
    step: int,
) -> None:
    """Go on from a checkpoint of the run folder; UserError where it is of another network."""
    try:
        state.restore(parts, recipe, optimizer, precision, seed=config["seed"], step=step)
    except state.Misfit as error:
        raise UserError(_other_network(Path(config["output_dir"]), config, error)) from None


def check_resume(config: Mapping[str, Any], make_recipe: Callable[[], nn.Module]) -> None:
    """UserError where the run would refuse its folder for the run in it, found without reading it.

    The recipe, which is made only where there is a checkpoint, may be on the meta device.
    """
    folder = Path(config["output_dir"])
    if not config["training"]["resume"]:
        refuse_overwriting(folder, Checkpoints(folder / CHECKPOINTS))
    checkpoint = _last_checkpoint(folder)
    if checkpoint is None:
        return
    ours = make_recipe().state_dict()
    try:
        saved = Parts(checkpoint).outline("recipe")
    except UserError:  # damaged: the run may go on from an earlier one
        return
    try:
        state.check_fits(ours, saved, str(checkpoint))
    except state.Misfit as error:
        raise UserError(_other_network(folder, config, error)) from None


def _load(recipe: nn.Module, path: str) -> list[str]:
    source = Path(str(path)).expanduser()  # no shell does it behind a =
    if not source.exists():
        raise UserError(f"training.weights: there is no {path}")
    if not source.is_dir():
        _load_file(recipe, source)
        notes = []
    elif (source / DESCRIPTION).exists():
        notes = _load_checkpoint(recipe, source)
    else:
        notes = _load_run(recipe, source)
    for name, weight in recipe.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"training.weights: {path} holds weights that are not finite ({name})")
    return notes


def _load_file(recipe: nn.Module, path: Path) -> None:
    if not hasattr(recipe, "load_weights"):
        raise UserError(
            f"training.weights: {type(recipe).__name__} reads checkpoint folders, no files"
        )
    with open(path, "rb"):  # what opens it for the weights may not say why it cannot
        pass
    recipe.load_weights(str(path))


def _load_checkpoint(recipe: nn.Module, folder: Path) -> list[str]:
    try:
        state.load_state(recipe, Parts(folder), str(folder))
    except state.Misfit as error:
        exported = _exported(folder.parent.parent)
        remedy = f"its network alone is {exported}" if exported else _NO_EXPORT
        raise UserError(f"{error}; {remedy}") from None
    return []


def _load_run(recipe: nn.Module, folder: Path) -> list[str]:
    exported = _exported(folder)
    checkpoint = _last_checkpoint(folder)
    if checkpoint is None and exported is None:
        own = folder / IN_HUB
        raise UserError(
            f"training.weights: {folder} is neither a run folder nor a checkpoint of one"
            f"{f'; give {own}' if own.is_file() else ''}"
        )
    why = "it has no checkpoint"
    if checkpoint is not None:
        try:
            state.load_state(recipe, Parts(checkpoint), str(checkpoint))
            return []
        except state.Misfit as error:
            if exported is None or not hasattr(recipe, "load_weights"):
                raise UserError(f"{error}; {_NO_EXPORT}") from None
            why = f"its state is of another recipe or network: {error.what}"
    assert exported is not None
    _load_file(recipe, exported)
    return [f"training.weights: {folder} is not taken whole ({why}), but its network, {exported}"]


_NO_EXPORT = (
    f"a run that was ended in order leaves its network alone in its folder's {EXPORTED}, which "
    "another recipe can start from"
)


def _exported(folder: Path) -> Path | None:
    return next((folder / name for name in (EXPORTED, FORMERLY) if (folder / name).is_file()), None)


def _last_checkpoint(folder: Path) -> Path | None:
    pointer = folder / CHECKPOINTS / "last"
    found = folder / CHECKPOINTS / (pointer.read_text().strip() if pointer.exists() else "?")
    return found if (found / DESCRIPTION).exists() else None


def _other_network(folder: Path, config: Mapping[str, Any], error: state.Misfit) -> str:
    """An error line with the keys that make this another network than the run folder's."""
    saved = folder / CONFIG
    changes: list[str] = []
    if saved.is_file():
        every = changed_keys(saved_config(saved), config)
        networks = [line for line in every if line.startswith("backbone.")]
        changes = networks or [line for line in every if line.startswith("recipe.")] or every
    if not changes:
        return f"{error}; choose another output_dir"
    more = f", and {len(changes) - MOST_CHANGES} more" if len(changes) > MOST_CHANGES else ""
    told = ", ".join(changes[:MOST_CHANGES]) + more
    return (
        f"{folder} holds a run of another network ({told}); choose another output_dir, or go on "
        f"with the run's own config: --config-file {saved}"
    )
