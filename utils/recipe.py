"""What the loop asks of a recipe: the one contract between `utils/training.py` and a way to train.

A recipe is an `nn.Module` that owns all that is saved. It does not know the loop, the launcher, the
optimiser's class or the probes; it receives a backbone factory and a data set. A feature is a
recipe's, a schedule's or a probe's business and never an `if` in the loop.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, SupportsFloat

from torch import Tensor, nn

from utils.errors import UserError, one_line
from utils.nearest import nearest
from utils.parallel import Wrap
from utils.schedules import Schedule


class Recipe(Protocol):
    """What the loop calls.

    All state that a checkpoint must hold is in parameters and buffers. After each step these are
    equal on every rank. Two more members are optional: `load_weights(path)`, to start from a file,
    and `image_size`, pixels a side of the images (None where nothing tells), to count their cost.
    """

    total_steps: int  # optimiser steps of the whole training
    accumulation: int  # micro-batches per step
    batch_size_per_gpu: int  # images per micro-batch and process
    schedules: Mapping[str, Schedule]  # by name; a group names its lr, all use weight_decay
    exported: nn.Module  # the net to save and to probe: teacher or classifier

    def parallelize(self, wrap: Wrap) -> None:
        """Call `wrap(part, units=blocks)` on every part, in one order on all ranks."""

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of params, lr_schedule, lr_multiplier and weight_decay_multiplier."""

    def batches(self, first_step: int) -> Iterator[Any]:
        """Endless micro-batches, `accumulation` per step: a function of (seed, step, rank).

        An attribute `errors` of theirs, a Counter, tells of images that could not be read.
        """

    def prepare(self, batch: Any) -> Any:
        """Finish a micro-batch on the device: the part of augmentation that workers leave open."""

    def losses(self, batch: Any, step: int) -> dict[str, Tensor]:
        """Scalars: `loss` is minimised (mean over the micro-batch), the others are shown."""

    def clipped_parts(self) -> dict[str, nn.Module]:
        """The parts whose gradient norms are clipped and reported separately."""

    def after_step(self, step: int) -> None:
        """Called after the optimiser's step (EMA of a teacher)."""


def check_recipe(recipe: object) -> None:
    """UserError that names all members which a recipe lacks."""
    methods = [name for name, member in vars(Recipe).items() if inspect.isfunction(member)]
    asked = [*Recipe.__annotations__, *(name for name in methods if not name.startswith("_"))]
    # Of the class too: a property may fail on the object, and that is another mistake.
    lacking = [n for n in asked if not hasattr(type(recipe), n) and not hasattr(recipe, n)]
    if lacking or not isinstance(recipe, nn.Module):
        what = f"it lacks {', '.join(lacking)}" if lacking else "it must be an nn.Module"
        raise UserError(f"recipe: {type(recipe).__name__} is no recipe: {what}")


def checked_groups(recipe: Recipe) -> list[dict[str, Any]]:
    """The recipe's groups of parameters; UserError unless each names a schedule that works."""
    schedules = recipe.schedules
    for name, schedule in schedules.items():
        value = schedule(0) if callable(schedule) else schedule
        if not callable(schedule) or not isinstance(value, SupportsFloat):
            what = f"schedules[{name!r}] must be a function from a step to a number"
            raise _wrong(recipe, what, value)
    groups = list(recipe.param_groups())
    for group in groups:
        if (name := group.get("lr_schedule", "lr")) not in schedules:
            what = f"lr_schedule of a group must be one of its schedules, {', '.join(schedules)}"
            raise _wrong(recipe, what, name, nearest(name, schedules))
    return groups


def checked_losses(recipe: Recipe, losses: Any) -> dict[str, Tensor]:
    """What `recipe.losses` returned; UserError unless its values are as the Protocol says."""
    if not isinstance(losses, Mapping) or "loss" not in losses:
        got = list(losses) if isinstance(losses, Mapping) else losses
        raise _wrong(recipe, "losses() must return tensors by name, `loss` among them", got)
    for name, value in losses.items():
        if not isinstance(value, Tensor) or value.ndim:
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else value
            raise _wrong(recipe, f"losses()[{name!r}] must be a tensor without dimensions", got)
    return dict(losses)


def checked_parts(recipe: Recipe) -> dict[str, nn.Module]:
    """What `recipe.clipped_parts` returns; UserError unless it is modules by name."""
    parts = recipe.clipped_parts()
    named = isinstance(parts, Mapping)
    if not named or not all(isinstance(part, nn.Module) for part in parts.values()):
        got = {key: type(part).__name__ for key, part in parts.items()} if named else parts
        raise _wrong(recipe, "clipped_parts() must return modules by name", got)
    return dict(parts)


def _wrong(recipe: object, what: str, got: object, hint: str = "") -> UserError:
    return UserError(one_line(f"recipe: {type(recipe).__name__}: {what}, not {got!r}{hint}"))
