"""From a config to a trained network: the objects, the run folder, the probes and the summary."""

import errno
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from utils import distributed, parallel
from utils.checkpoints import state
from utils.checkpoints.checkpoint import Checkpoints, NotSaved
from utils.checkpoints.exported import EXPORTED
from utils.checkpoints.weights_file import export_weights
from utils.config.build import build, place_of, plain, raised_by_us
from utils.config.settings import check_max_steps, check_settings
from utils.data.classes import class_metadata
from utils.endings import MAX_STEPS
from utils.errors import UserError, one_line
from utils.health import Health
from utils.lock import FolderLock
from utils.metrics import Metrics
from utils.optimizers import make_optimizer
from utils.precision import Precision
from utils.probing import ProbeRunner
from utils.randomness import seed_everything
from utils.recipe import Recipe, check_recipe
from utils.run_folder import BATCH, describe_code, fingerprint, prepare_folder, refuse_overwriting
from utils.signals import StopSignal
from utils.sinks import make_sinks
from utils.start import load_weights, restore
from utils.summary import History, how_it_ended, read_history, write_summary
from utils.training import fit
from utils.watchdog import Watchdog


def train(config: Mapping[str, Any]) -> dict[str, Any]:
    """Build what `config` describes and train it; returns the summary (also in summary.json).

    On a stop signal: saves, calls the earlier handler of the signal (submitit's requeues the job),
    and exits with 128 plus the signal's number.
    """
    config = plain(config)
    check_settings(config)
    with StopSignal() as stop:
        # The watchdog ends a hung step; this timeout, hangs elsewhere (set-up, probes).
        patience = max(30.0, _hang_timeout(config) / 30)
        with distributed.session(config["device"], timeout_min=patience) as device:
            summary = _build_and_run(config, device, stop)
            received = max(
                (s for s in distributed.gather_objects(stop.received) if s), default=None
            )
        earlier = stop.earlier_handler()
    if received is not None:
        if earlier is not None:
            earlier(received, None)
        raise SystemExit(128 + received)
    return summary


def run_built(
    config: Mapping[str, Any],
    recipe: Recipe,
    optimizer_factory: Callable[..., torch.optim.Optimizer],
    *,
    data: Mapping[str, Any],
    probes: Mapping[str, Callable[..., dict[str, float]]],
    device: torch.device,
    stop: StopSignal,
) -> dict[str, Any]:
    """Train built objects in the run folder that `config` names; returns the summary.

    Raises UserError where another process holds the folder, the disk is full, or data or networks
    find a setting wrong when it is used.
    """
    folder = Path(config["output_dir"])
    checkpoints = Checkpoints(
        folder / "checkpoints",
        fingerprint=fingerprint(config),
        plan={"total_steps": recipe.total_steps, BATCH: _images_per_step(recipe)},
        **config["checkpoint"],
    )
    with _locked(folder):
        if not config["training"]["resume"]:
            _on_main(lambda: refuse_overwriting(folder, checkpoints))
        try:
            return _run_locked(
                config,
                recipe,
                optimizer_factory,
                checkpoints,
                data=data,
                probes=probes,
                device=device,
                stop=stop,
            )
        except ValueError as error:
            if isinstance(error, UserError) or not raised_by_us(error):
                raise
            raise UserError(one_line(error) + place_of(error)) from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            kept = checkpoints.newest
            fate = f"the checkpoint of step {kept} stays" if kept else "there is no checkpoint yet"
            raise UserError(f"{folder}: {error.strerror}; {fate}") from None


def _run_locked(
    config: Mapping[str, Any],
    recipe: Recipe,
    optimizer_factory: Callable[..., torch.optim.Optimizer],
    checkpoints: Checkpoints,
    *,
    data: Mapping[str, Any],
    probes: Mapping[str, Callable[..., dict[str, float]]],
    device: torch.device,
    stop: StopSignal,
) -> dict[str, Any]:
    folder, training = Path(config["output_dir"]), config["training"]
    precision = Precision(training["precision"], device)
    optimizer, first_step, notes = _prepare(
        config, recipe, optimizer_factory, checkpoints, precision, device
    )
    last_step = _last_step(recipe.total_steps, training["max_steps"])
    history = _on_main(lambda: read_history(folder, first_step, config, recipe.schedules))
    checkpoints.seconds_before = max(
        checkpoints.seconds_before, history.summary.get("seconds", 0.0)
    )
    is_done = first_step > 0 and first_step >= last_step
    if not is_done:  # without a step to train, config.yaml stays the one of the weights
        notes = _on_main(lambda: prepare_folder(folder, config, checkpoints)) + notes
        notes += [f"resuming from step {first_step}"] if checkpoints.newest is not None else []
    metrics = _make_metrics(folder, config, recipe, first_step, last_step)
    for note in [*precision.notes(), *notes]:
        metrics.say(note)
    usable = _usable_probes(probes, data, metrics)
    runner = ProbeRunner(usable, recipe.exported, data, folder, every=config["probe_every"])
    if is_done:
        return _probe_again(config, recipe, checkpoints, history, data, runner, metrics, first_step)
    health = Health(nan_patience=training["nan_patience"])
    health.skipped = history.skipped
    watchdog = Watchdog(
        folder / "hangs", timeout_s=_hang_timeout(config), watched=fit.__code__.co_filename
    )
    try:
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
                clip_grad=training["clip_grad"],
                probe=runner,
            )
        if step < last_step:
            metrics.say(f"stopped at step {step} of {last_step}; the same command goes on there")
        # Before the probes: an error in one must not lose the trained network.
        export_net(folder, config, step, recipe.exported, data.get("train"))
        if step >= last_step:
            metrics.record(step, runner.final(step))
    except NotSaved as error:
        raise _export_after_failed_save(error, config, recipe, checkpoints, data, metrics) from None
    finally:
        metrics.say(checkpoints.news())
        metrics.close()
    signals = [one.name for one in distributed.gather_objects(stop.received) if one]
    stopped_by = MAX_STEPS if step >= last_step else max(signals, default="a signal")
    summary = _facts(config, recipe, step, checkpoints, stopped_by)
    summary |= {"skipped_steps": health.skipped, "alarm": health.alarm}
    return write_summary(folder, summary | metrics.last | {"step": step} | runner.results)


def _export_after_failed_save(
    error: NotSaved,
    config: Mapping[str, Any],
    recipe: Recipe,
    checkpoints: Checkpoints,
    data: Mapping[str, Any],
    metrics: Metrics,
) -> UserError:
    # The disk took no checkpoint; the network alone, a part of it, may still fit. The error that is
    # returned says where it is.
    for line in checkpoints.news().splitlines():
        metrics.say(line if line != str(error) else "")
    folder, told = Path(config["output_dir"]), ""
    try:
        export_net(folder, config, metrics.step, recipe.exported, data.get("train"))
        told = f"; the network alone, of step {metrics.step}, is {folder / EXPORTED}"
    except (UserError, OSError) as why:  # on rank 0, after the last collective
        told = f"; {why}"
    return UserError(f"{error}{distributed.broadcast_object(told)}")


def _probe_again(
    config: Mapping[str, Any],
    recipe: Recipe,
    checkpoints: Checkpoints,
    history: History,
    data: Mapping[str, Any],
    runner: ProbeRunner,
    metrics: Metrics,
    step: int,
) -> dict[str, Any]:
    # No step is left: run the probes that have no figures yet, and add these to the summary.
    folder, total = Path(config["output_dir"]), recipe.total_steps
    most = config["training"]["max_steps"]
    metrics.say(
        f"already finished at step {step}"
        if step >= total
        else f"already at step {step} of {total}: training.max_steps={most} leaves no step"
    )
    if kept := sorted(history.judged & runner.probes.keys()):
        metrics.say(f"judged before, with the same settings: {', '.join(kept)}")
    runner.probes = {k: probe for k, probe in runner.probes.items() if k not in history.judged}
    try:
        if not (history.summary and history.exported):
            export_net(folder, config, step, recipe.exported, data.get("train"))
        metrics.record(step, runner.final(step))
    finally:
        metrics.close()
    summary = _facts(config, recipe, step, checkpoints, MAX_STEPS)
    summary |= {"skipped_steps": history.skipped, "alarm": ""}
    summary |= history.summary or history.logged
    summary |= how_it_ended(step, summary["total_steps"])  # older versions defined it otherwise
    here = {"name": config["name"], "output_dir": str(folder), "step": step}
    return write_summary(folder, summary | here | runner.results)


def _facts(
    config: Mapping[str, Any], recipe: Recipe, step: int, checkpoints: Checkpoints, stopped_by: str
) -> dict[str, Any]:
    return {
        "name": config["name"],
        "output_dir": str(Path(config["output_dir"])),
        "step": step,
        "total_steps": recipe.total_steps,
        **how_it_ended(step, recipe.total_steps, stopped_by),
        "seconds": round(checkpoints.seconds, 1),
        "parameters": sum(p.numel() for p in recipe.exported.parameters()),
    }


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # Rank 0 holds the lock for all ranks.
    lock = FolderLock(folder)
    _on_main(lock.acquire)
    try:
        yield
    finally:
        lock.release()


def _hang_timeout(config: Mapping[str, Any]) -> float:
    # The config.yaml of an older run lacks this key.
    return float(config["training"].get("hang_timeout_s", 900) or 0)


def _images_per_step(recipe: Recipe) -> int:
    return recipe.batch_size_per_gpu * recipe.accumulation * distributed.world_size()


def _make_metrics(
    folder: Path, config: Mapping[str, Any], recipe: Recipe, first_step: int, last_step: int
) -> Metrics:
    sinks: Any = ()
    if distributed.is_main():
        told = {"name": config["name"], "config": dict(config), "first_step": first_step}
        sinks = make_sinks(folder, **told, **config["logging"])
    return Metrics(
        folder,
        first_step=first_step,
        total_steps=last_step,
        recipe_steps=recipe.total_steps,
        log_every=config["training"]["log_every"],
        images_per_step=_images_per_step(recipe),
        sinks=sinks,
    )


def _usable_probes(
    probes: Mapping[str, Callable[..., dict[str, float]]], data: Mapping[str, Any], metrics: Metrics
) -> dict[str, Callable[..., dict[str, float]]]:
    # The probes whose data is there; the others are named at the start, not at the end.
    bare = [name for name, part in data.items() if getattr(part, "labels", part) is None]
    usable = {}
    for name, probe in probes.items():
        # A probe without `splits` reads both, as in evaluation/judge.py.
        if "val" not in data and "val" in getattr(probe, "splits", ("train", "val")):
            metrics.say(f"probe {name} is left out: there is no data.val")
        elif bare and getattr(probe, "needs_labels", False):
            metrics.say(f"probe {name} is left out: data.{bare[0]} has no labels")
        else:
            usable[name] = probe
    return usable


def _on_main(action: Callable[[], Any]) -> Any:
    # Run on rank 0, which alone writes to the folder; result or error reach every rank.
    result: Any = None
    if distributed.is_main():
        try:
            result = action()
        except (UserError, OSError) as error:
            result = error
    result = distributed.broadcast_object(result)
    if isinstance(result, UserError | OSError):
        raise result
    return result


def _prepare(
    config: Mapping[str, Any],
    recipe: Recipe,
    optimizer_factory: Callable[..., torch.optim.Optimizer],
    checkpoints: Checkpoints,
    precision: Precision,
    device: torch.device,
) -> tuple[torch.optim.Optimizer, int, list[str]]:
    # Move the recipe to its device, load weights, shard, make the optimiser: (optimiser, first
    # step, notes for the log).
    training, seed = config["training"], config["seed"]
    module = cast(nn.Module, recipe).to(device)
    parallel.broadcast_state(module)
    # In this order: the last checkpoint of this run, training.weights, fresh weights.
    weights = [name for name, _ in module.named_parameters()]
    found = checkpoints.load(weights) if training["resume"] else None
    given = found is None and training["weights"]
    notes = load_weights(module, training["weights"]) if given else []
    options = {k: training[k] for k in ("sharding", "compile", "activation_checkpointing")}
    recipe.parallelize(parallel.make_wrap(device, precision, **options))
    optimizer = make_optimizer(optimizer_factory, recipe.param_groups(), module)
    seed_everything(state.rank_seed(seed))  # drop path differs from rank to rank
    if found is None:
        return optimizer, 0, notes
    step, parts, _, damaged = found
    restore(parts, module, optimizer, precision, config=config, step=step)
    return optimizer, step, damaged


def _build_and_run(
    config: Mapping[str, Any], device: torch.device, stop: StopSignal
) -> dict[str, Any]:
    # A function of its own, so that the objects are gone when the process group ends.
    seed_everything(config["seed"])  # the same networks on every rank
    factories = {name: {**config[name], "_partial_": True} for name in ("recipe", "backbone")}
    built = build({"data": config["data"], **factories})
    data = {name: part for name, part in built["data"].items() if part is not None}
    for split in data.keys() & {"train", "val"}:
        if not hasattr(data[split], "read"):
            raise UserError(f"data.{split}: {config['data'][split]['_target_']} is no data set")
    recipe = built["recipe"](backbone=built["backbone"], dataset=data["train"])
    check_recipe(recipe)
    factories = {"optimizer": {**config["optimizer"], "_partial_": True}}
    built = build({"probes": config["probes"] or {}, **factories})
    probes = {name: probe for name, probe in built["probes"].items() if probe is not None}
    for name, probe in probes.items():
        if not callable(probe):
            raise UserError(f"probes.{name}: {config['probes'][name]['_target_']} is no probe")
    return run_built(
        config, recipe, built["optimizer"], data=data, probes=probes, device=device, stop=stop
    )


def _last_step(total: int, most: int | None) -> int:
    check_max_steps(most)
    return total if most is None else min(total, most)


def export_net(
    folder: Path, config: Mapping[str, Any], step: int, exported: nn.Module, dataset: Any
) -> None:
    """Write the net a run is for, with what it was built from; every rank must call this."""
    weights = state.whole_state(exported)
    if not distributed.is_main():
        return
    metadata = {
        "constructor": json.dumps(config["backbone"]),
        "step": str(step),
        "code": describe_code(),
        # Also for a net without a classifier: the classes of the images it was trained on.
        **class_metadata(dataset),
    }
    export_weights(folder / EXPORTED, weights, metadata)
