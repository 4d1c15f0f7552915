"""From a config to a trained network: the processes meet, and one holds the run folder for all."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from utils import distributed, parallel
from utils.checkpoints import state
from utils.checkpoints.checkpoint import NotSaved
from utils.config.build import plain
from utils.config.settings import check_settings
from utils.distributed import on_main
from utils.endings import MAX_STEPS
from utils.errors import FULL, UserError
from utils.health import Health
from utils.joining import session
from utils.lock import FolderLock
from utils.metrics import Metrics
from utils.optimizers import make_optimizer
from utils.precision import Precision
from utils.probing import ProbeRunner
from utils.randomness import seed_everything
from utils.recipe import checked_groups
from utils.run_end import export_after_failed_save, export_net, facts, probe_again, probe_at_end
from utils.run_folder import prepare_folder, refuse_overwriting
from utils.run_objects import Run, build_run
from utils.signals import StopSignal
from utils.sinks import make_sinks
from utils.start import load_weights, restore
from utils.summary import read_history, write_summary
from utils.training import fit
from utils.watchdog import Watchdog


def train(config: Mapping[str, Any]) -> dict[str, Any]:
    """Build what `config` describes and train it; returns the summary (also in summary.json).

    On a stop signal: saves, calls the earlier handler of the signal, if another had one (submitit
    without Slurm starts the job again by it), and exits with 128 plus the signal's number.
    """
    config = plain(config)
    check_settings(config)
    with StopSignal() as stop:
        # The watchdog ends a hung step; this timeout, hangs elsewhere (set-up, probes).
        patience = max(30.0, _hang_timeout(config) / 30)
        with session(config["device"], timeout_min=patience) as device:
            # Without a name here, so that the objects are gone when the process group ends.
            summary = run_built(build_run(config), device, stop)
            received = max(
                (s for s in distributed.gather_objects(stop.received) if s), default=None
            )
        earlier = stop.earlier_handler()
    if received is not None:
        if earlier is not None:
            earlier(received, None)
        raise SystemExit(128 + received)
    return summary


def run_built(run: Run, device: torch.device, stop: StopSignal) -> dict[str, Any]:
    """Train in the run folder, from where it stands; returns the summary.

    Raises UserError where another process holds the folder or the disk is full.
    """
    with _locked(run.folder):
        if not run.config["training"]["resume"]:
            on_main(lambda: refuse_overwriting(run.folder, run.checkpoints))
        try:
            return _run_locked(run, device, stop)
        except OSError as error:
            if error.errno not in FULL:
                raise
            kept = run.checkpoints.newest
            fate = f"the checkpoint of step {kept} stays" if kept else "there is no checkpoint yet"
            raise UserError(f"{run.folder}: {error.strerror}; {fate}") from None
        finally:
            run.checkpoints.settle()


def _run_locked(run: Run, device: torch.device, stop: StopSignal) -> dict[str, Any]:
    config, recipe, folder, checkpoints = run.config, run.recipe, run.folder, run.checkpoints
    training, last_step = config["training"], run.last_step
    precision = Precision(training["precision"], device)
    optimizer, first_step, notes = _prepare(run, precision, device)
    history = on_main(lambda: read_history(folder, first_step, config, recipe.schedules))
    checkpoints.seconds_before = max(
        checkpoints.seconds_before, history.summary.get("seconds", 0.0)
    )
    is_done = first_step > 0 and first_step >= last_step
    if not is_done:  # without a step to train, config.yaml stays the one of the weights
        notes = on_main(lambda: prepare_folder(folder, config, checkpoints)) + notes
        notes += [f"resuming from step {first_step}"] if checkpoints.newest is not None else []
    metrics = _make_metrics(run, first_step, history.unread)
    for note in [*precision.notes(), *notes]:
        metrics.say(note)
    usable = _usable_probes(run, metrics)
    runner = ProbeRunner(usable, recipe.exported, run.data, folder, every=config["probe_every"])
    if is_done:
        return probe_again(run, history, metrics, runner)
    health = Health(nan_patience=training["nan_patience"])
    health.skipped = history.skipped
    watchdog = Watchdog(
        folder / "hangs", timeout_s=_hang_timeout(config), watched=fit.__code__.co_filename
    )
    try:
        if runner.owed(first_step, history.logged):
            metrics.record(first_step, runner(first_step))
        with watchdog:
            step = fit(
                recipe,
                optimizer,
                first_step=first_step,
                last_step=last_step,
                device=device,
                precision=precision,
                health=health,
                metrics=metrics,
                checkpoints=checkpoints,
                stop=stop,
                watchdog=watchdog,
                probes=runner,
                clip_grad=training["clip_grad"],
            )
        if step < last_step:
            metrics.say(f"stopped at step {step} of {last_step}; the same command goes on there")
        # Before the probes: an error in one must not lose the trained network.
        export_net(run, step)
        if step >= last_step:
            probe_at_end(run, metrics, runner, health)
    except NotSaved as error:
        raise export_after_failed_save(run, metrics, error) from None
    finally:
        metrics.say(checkpoints.news())
        metrics.close()
    signals = [one.name for one in distributed.gather_objects(stop.received) if one]
    stopped_by = MAX_STEPS if step >= last_step else max(signals, default="a signal")
    summary = facts(run, step, stopped_by, skipped=health.skipped, alarm=health.features.alarm)
    return write_summary(folder, summary | metrics.last | {"step": step} | runner.results)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # Rank 0 holds the lock for all ranks.
    lock = FolderLock(folder)
    on_main(lock.acquire)
    try:
        yield
    finally:
        lock.release()


def _hang_timeout(config: Mapping[str, Any]) -> float:
    # The config.yaml of an older run lacks this key.
    return float(config["training"].get("hang_timeout_s", 900) or 0)


def _prepare(
    run: Run, precision: Precision, device: torch.device
) -> tuple[torch.optim.Optimizer, int, list[str]]:
    # Move the recipe to its device, load weights, shard, make the optimiser: (optimiser, first
    # step, notes for the log).
    recipe, training, seed = run.recipe, run.config["training"], run.config["seed"]
    module = cast(nn.Module, recipe).to(device)
    parallel.broadcast_state(module)
    # In this order: the last checkpoint of this run, training.weights, fresh weights.
    weights = [name for name, _ in module.named_parameters()]
    found = run.checkpoints.load(weights) if training["resume"] else None
    given = found is None and training["weights"]
    notes = load_weights(module, training["weights"]) if given else []
    options = {k: training[k] for k in ("sharding", "compile", "activation_checkpointing")}
    recipe.parallelize(parallel.make_wrap(device, precision, **options))
    optimizer = make_optimizer(run.optimizer, checked_groups(recipe), module)
    seed_everything(state.rank_seed(seed))  # drop path differs from rank to rank
    if found is None:
        return optimizer, 0, notes
    step, parts, damaged = found
    restore(parts, module, optimizer, precision, config=run.config, step=step)
    return optimizer, step, damaged


def _make_metrics(run: Run, first_step: int, unread_before: int) -> Metrics:
    config = run.config
    sinks: Any = ()
    if distributed.is_main():
        told = {"name": config["name"], "config": dict(config), "first_step": first_step}
        sinks = make_sinks(run.folder, **told, **config["logging"])
    return Metrics(
        run.folder,
        first_step=first_step,
        total_steps=run.last_step,
        recipe_steps=run.recipe.total_steps,
        log_every=config["training"]["log_every"],
        images_per_step=run.images_per_step,
        unread_before=unread_before,
        sinks=sinks,
    )


def _usable_probes(run: Run, metrics: Metrics) -> dict[str, Callable[..., dict[str, float]]]:
    # The probes whose data is there; the others are named at the start, not at the end.
    bare = [name for name, part in run.data.items() if getattr(part, "labels", part) is None]
    usable = {}
    for name, probe in run.probes.items():
        # A probe without `splits` reads both, as in evaluation/data.py.
        if "val" not in run.data and "val" in getattr(probe, "splits", ("train", "val")):
            metrics.say(f"probe {name} is left out: there is no data.val")
        elif bare and getattr(probe, "needs_labels", False):
            metrics.say(f"probe {name} is left out: data.{bare[0]} has no labels")
        else:
            usable[name] = probe
    return usable
