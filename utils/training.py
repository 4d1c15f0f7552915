"""The loop. What plugs into it is in `utils/recipe.py`; `utils/run_objects.py` builds it."""

from typing import cast

import torch
from torch import nn

from utils import parallel
from utils.checkpoints import state
from utils.checkpoints.checkpoint import Checkpoints, NotSaved
from utils.errors import UserError
from utils.health import Health, broken_weights, what_remains
from utils.metrics import Metrics
from utils.optimizers import apply_schedules, clip_parts
from utils.precision import Precision
from utils.probing import ProbeRunner
from utils.randomness import ShieldedBatches
from utils.recipe import Recipe, checked_losses, checked_parts
from utils.signals import StopSignal
from utils.watchdog import Watchdog


def fit(
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    *,
    first_step: int,
    last_step: int,
    device: torch.device,
    precision: Precision,
    health: Health,
    metrics: Metrics,
    checkpoints: Checkpoints,
    stop: StopSignal,
    watchdog: Watchdog,
    probes: ProbeRunner,
    clip_grad: float | None = None,
) -> int:
    """Train from `first_step` to `last_step` or a stop signal, save, return the steps finished.

    Raises UserError after too many steps in a row that were not finite, and if the last checkpoint
    cannot be written or its weights are broken. Every rank must call this.
    """
    batches = ShieldedBatches(recipe.batches(first_step))
    module = cast(nn.Module, recipe)  # a Protocol cannot inherit from a class
    gradients = parallel.Gradients(module)
    step, stopping = first_step, False

    def save(at: int) -> str:
        metrics.flush(batches.waited(), batches.unread)
        if not (fault := broken_weights(module, at)):
            checkpoints.start(at, state.collect(module, optimizer, precision), replace=at == step)
        return fault

    while step < last_step and not stopping:
        # Schedule, forward, backward
        values = apply_schedules(optimizer, recipe.schedules, step)
        health.remember(module)
        for micro_batch in range(recipe.accumulation):
            batch = recipe.prepare(parallel.to_device(next(batches), device))
            gradients.set_sync(micro_batch == recipe.accumulation - 1)
            with precision.autocast():
                losses = checked_losses(recipe, recipe.losses(batch, step))
            precision.backward(losses["loss"] / recipe.accumulation)
            metrics.add(losses)
        # Clip
        gradients.finish()
        precision.unscale(optimizer)
        norms = clip_parts(checked_parts(recipe), clip_grad)
        # Step, after-step; a step that is not finite leaves no trace
        finite, stopping = health.agree(step, metrics.current(), norms, stop, precision)
        if finite:
            precision.step(optimizer)
            recipe.after_step(step)
        else:
            precision.skip()
            health.undo()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        # Log
        metrics.end_step(step, values, norms)
        if metrics.due(step) or step == last_step or health.hopeless:
            metrics.flush(batches.waited(), batches.unread)
            with precision.autocast():
                metrics.record(step, health.features.examine(recipe.exported, batch))
            metrics.say(health.features.alarm)
            metrics.say(checkpoints.news())
        # Save
        if health.hopeless:
            raise health.give_up(module, checkpoints, save)
        if checkpoints.due(step):
            metrics.say(save(step))
        # Probe, but not in the time that is left to leave
        if probes.due(step) and step < last_step and not stopping:
            _probe(step, probes, checkpoints, metrics, watchdog)
        metrics.rest()
        watchdog.finished(step)
    checkpoints.wait()
    if step > first_step and checkpoints.newest != step and (fault := save(step)):
        raise UserError(what_remains(fault, module, checkpoints))
    if problem := checkpoints.wait():
        raise NotSaved(problem)
    return step


def _probe(
    step: int,
    probes: ProbeRunner,
    checkpoints: Checkpoints,
    metrics: Metrics,
    watchdog: Watchdog,
) -> None:
    checkpoints.wait()  # whatever happens in a probe costs no step
    with watchdog.resting():
        metrics.record(step, probes(step))
