"""From a config to a trained network: the objects, the run folder, the probes and the summary."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from utils import distributed, parallel, state
from utils.build import build, plain
from utils.checkpoint import Checkpoints, export_weights, write_text
from utils.data.classes import class_metadata
from utils.errors import UserError
from utils.health import Health
from utils.metrics import Metrics
from utils.optimizers import make_optimizer
from utils.precision import Precision
from utils.randomness import preserved_randomness, seed_everything
from utils.recipe import Recipe
from utils.run_folder import describe_code, fingerprint, prepare_folder
from utils.signals import StopSignal
from utils.sinks import make_sinks
from utils.training import fit

EXPORTED = "exported/teacher.safetensors"


def run(config: Mapping[str, Any]) -> dict[str, Any]:
    """Build what `config` describes and train it; returns the summary (also in summary.json).

    On a stop signal: saves, hands the signal to whoever handled it before (submitit requeues), and
    exits with 128 plus its number.
    """
    config = plain(config)
    with StopSignal() as stop:
        with distributed.session(config["device"]) as device:
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
    """Train built objects in the run folder that `config` names; the summary is returned."""
    start, folder = time.perf_counter(), Path(config["output_dir"])
    training = config["training"]
    checkpoints = Checkpoints(
        folder / "checkpoints", fingerprint=fingerprint(config), **config["checkpoint"]
    )
    notes = _prepare(folder, config, checkpoints)
    precision = Precision(training["precision"], device)
    optimizer, first_step, more = _set_out(
        config, recipe, optimizer_factory, checkpoints, precision, device
    )
    last_step = min(recipe.total_steps, training["max_steps"] or recipe.total_steps)
    metrics = _make_metrics(folder, config, recipe, first_step, last_step)
    for note in [*notes, *more]:
        metrics.say(note)
    health = Health(nan_patience=training["nan_patience"])
    judge = Judge(
        _fitting(probes, data, metrics), recipe.exported, data, folder, every=config["probe_every"]
    )
    try:
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
            clip_grad=training["clip_grad"],
            probe=judge,
        )
        if step < last_step:
            metrics.say(f"stopped at step {step} of {last_step}; the same command goes on there")
        else:
            # Before the probes: what they stumble over must not cost what was trained.
            export_net(folder, config, step, recipe.exported, data.get("train"))
            metrics.record(step, judge.final(step))
    finally:
        metrics.close()
    summary = {
        "name": config["name"],
        "output_dir": str(folder),
        "step": step,
        "total_steps": recipe.total_steps,
        "finished": step >= last_step,
        "seconds": round(time.perf_counter() - start, 1),
        "parameters": sum(p.numel() for p in recipe.exported.parameters()),
        "skipped_steps": health.skipped,
        "alarm": health.alarm,
        **(metrics.last | {"step": step} | judge.results),
    }
    if step < last_step:
        export_net(folder, config, step, recipe.exported, data.get("train"))
    return _leave(folder, summary)


def _make_metrics(
    folder: Path, config: Mapping[str, Any], recipe: Recipe, first_step: int, last_step: int
) -> Metrics:
    sinks: Any = ()
    if distributed.is_main():
        sinks = make_sinks(folder, name=config["name"], config=dict(config), **config["logging"])
    return Metrics(
        folder,
        first_step=first_step,
        total_steps=last_step,
        log_every=config["training"]["log_every"],
        images_per_step=recipe.batch_size_per_gpu * recipe.accumulation * distributed.world_size(),
        sinks=sinks,
    )


def _fitting(
    probes: Mapping[str, Callable[..., dict[str, float]]], data: Mapping[str, Any], metrics: Metrics
) -> dict[str, Callable[..., dict[str, float]]]:
    # The probes that this data can serve; said at the start, not found out at the end.
    bare = [name for name, part in data.items() if getattr(part, "labels", part) is None]
    unfit = [name for name, p in probes.items() if bare and getattr(p, "needs_labels", False)]
    for name in unfit:
        metrics.say(f"probe {name} is left out: data.{bare[0]} has no labels")
    return {name: probe for name, probe in probes.items() if name not in unfit}


def _prepare(folder: Path, config: Mapping[str, Any], checkpoints: Checkpoints) -> list[str]:
    # Rank 0 looks after the folder; its refusal must reach every rank.
    resume, notes = config["training"]["resume"], None
    if distributed.is_main():
        notes = prepare_folder(folder, config, checkpoints, resume=resume)
    notes = distributed.broadcast_object(notes)
    if isinstance(notes, UserError):
        raise notes
    return notes


def _set_out(
    config: Mapping[str, Any],
    recipe: Recipe,
    optimizer_factory: Callable[..., torch.optim.Optimizer],
    checkpoints: Checkpoints,
    precision: Precision,
    device: torch.device,
) -> tuple[torch.optim.Optimizer, int, list[str]]:
    # The recipe on its devices with the weights to begin with, its optimiser, the first step.
    training, seed = config["training"], config["seed"]
    module = cast(nn.Module, recipe).to(device)
    parallel.broadcast_state(module)
    # The order of precedence: a checkpoint of this run, given weights, fresh ones.
    found = checkpoints.load() if training["resume"] else None
    if found is None and training["weights"]:
        load_weights(module, training["weights"])
    options = {k: training[k] for k in ("sharding", "compile", "activation_checkpointing")}
    recipe.parallelize(parallel.make_wrap(device, precision, **options))
    optimizer = make_optimizer(optimizer_factory, recipe.param_groups(), module)
    seed_everything(state.rank_seed(seed))  # drop path differs from rank to rank
    if found is None:
        return optimizer, 0, []
    step, parts, _, damaged = found
    state.restore(parts, module, optimizer, precision, seed=seed)
    return optimizer, step, [*damaged, f"resuming from step {step}"]


def _build_and_run(
    config: Mapping[str, Any], device: torch.device, stop: StopSignal
) -> dict[str, Any]:
    # A function of its own, so that the objects are gone when the process group ends.
    seed_everything(config["seed"])  # the same networks on every rank
    data = {name: build(node) for name, node in config["data"].items() if node is not None}
    recipe = build({**config["recipe"], "_partial_": True})(
        backbone=build({**config["backbone"], "_partial_": True}), dataset=data["train"]
    )
    optimizer = build({**config["optimizer"], "_partial_": True})
    probes = {name: build(node) for name, node in config["probes"].items() if node is not None}
    return run_built(config, recipe, optimizer, data=data, probes=probes, device=device, stop=stop)


def load_weights(recipe: nn.Module, path: str) -> None:
    """Start from a run folder, one of its checkpoints, or a file that the recipe can read.

    Raises UserError, naming what misses and what is left over, unless every tensor finds its place.
    """
    source = Path(path)
    if not source.exists():
        raise UserError(f"training.weights: there is no {path}")
    if source.is_dir():
        folder = source if (source / "recipe.pt").exists() else source / "checkpoints"
        if folder != source:
            pointer = folder / "last"
            folder = folder / (pointer.read_text().strip() if pointer.exists() else "?")
        if not (folder / "recipe.pt").exists():
            raise UserError(
                f"training.weights: {path} is neither a run folder nor a checkpoint of one"
            )
        saved = torch.load(folder / "recipe.pt", map_location="cpu", weights_only=True, mmap=True)
        state.load_state(recipe, saved, str(folder))
    elif hasattr(recipe, "load_weights"):
        recipe.load_weights(path)
    else:
        raise UserError(
            f"training.weights: {type(recipe).__name__} reads checkpoint folders, no files"
        )


class Judge:
    """The probes of a run, called every `every` steps (0: only at the end) on every rank.

    A probe is `probe(net, data, output_dir, step) -> dict of numbers`; its numbers are reported as
    `name/key`, and it may write to `folder/name`. It finds the net in evaluation mode and cannot
    disturb the training's random numbers.
    """

    def __init__(
        self,
        probes: Mapping[str, Callable[..., dict[str, float]]],
        net: nn.Module,
        data: Mapping[str, Any],
        folder: Path,
        *,
        every: int = 0,
    ) -> None:
        self.probes, self.net, self.data, self.folder, self.every = probes, net, data, folder, every
        self.results: dict[str, float] = {}
        self._done = -1

    def __call__(self, step: int) -> dict[str, float]:
        """The results at `step`, if it is due."""
        return self.final(step) if self.every and step % self.every == 0 else {}

    def final(self, step: int) -> dict[str, float]:
        """The results at `step`, unless they were just told."""
        if self._done == step:
            return {}
        self._done = step
        modes = {part: part.training for part in self.net.modules()}
        self.net.eval()
        results: dict[str, float] = {}
        with torch.no_grad(), preserved_randomness():
            for name, probe in self.probes.items():
                values = probe(self.net, data=self.data, output_dir=self.folder / name, step=step)
                results |= {f"{name}/{key}": float(value) for key, value in values.items()}
        for part, mode in modes.items():
            part.training = mode
        self.results |= results
        return results


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
        # Of a net without a classifier it says what it has seen.
        **class_metadata(dataset),
    }
    export_weights(folder / EXPORTED, weights, metadata)


def _leave(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    # Rank 0's last act: what others read without knowing the loop.
    if not distributed.is_main():
        return summary
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    table = Table(title=f"{summary['name']}: {folder}", show_header=False)
    for key, value in summary.items():
        if key not in ("name", "output_dir") and value != "":
            table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
    return summary
