"""How a run ends: its network in the run folder, the last probes, and the facts of its summary."""

import json
from contextlib import suppress
from typing import Any

from utils import distributed
from utils.checkpoints import state
from utils.checkpoints.checkpoint import NotSaved
from utils.checkpoints.weights_file import export_weights
from utils.data.classes import class_metadata
from utils.endings import MAX_STEPS
from utils.errors import UserError
from utils.health import Health
from utils.metrics import Metrics
from utils.probing import ProbeRunner
from utils.run_files import EXPORTED
from utils.run_folder import describe_code, unheeded
from utils.run_objects import Run
from utils.summary import History, how_it_ended, write_summary


def export_net(run: Run, step: int) -> None:
    """Write the net a run is for, with what it was built from; every rank must call this."""
    weights = state.whole_state(run.recipe.exported)
    if not distributed.is_main():
        return
    metadata = {
        "constructor": json.dumps(run.config["backbone"]),
        "step": str(step),
        "code": describe_code(),
        # Also for a net without a classifier: the classes of the images it was trained on.
        **class_metadata(run.data.get("train")),
    }
    export_weights(run.folder / EXPORTED, weights, metadata)


def export_after_failed_save(run: Run, metrics: Metrics, error: NotSaved) -> UserError:
    """Try to write the network alone, a part of the checkpoint that the disk did not take.

    Returns the error to raise, which says where the network is. Every rank must call this.
    """
    for line in run.checkpoints.news().splitlines():
        metrics.say(line if line != str(error) else "")
    step, told = metrics.step, ""
    try:
        export_net(run, step)
        told = f"; the network alone, of step {step}, is {run.folder / EXPORTED}"
    except (UserError, OSError) as why:  # on rank 0, after the last collective
        told = f"; {why}"
    return UserError(f"{error}{distributed.broadcast_object(told)}")


def probe_at_end(run: Run, metrics: Metrics, runner: ProbeRunner, health: Health) -> None:
    """Run the probes after the last step; every rank must call this.

    An error in one leaves a summary with the figures of those before it: the network is trained and
    exported, and the same command then runs only the probes that are missing.
    """
    step = metrics.step
    try:
        metrics.record(step, runner(step))
    except Exception:
        # Nothing here waits for the other ranks, which may still be in the probe.
        metrics.record(step, runner.results)
        summary = facts(run, step, MAX_STEPS, skipped=health.skipped, alarm=health.features.alarm)
        # Figures of probes at earlier steps would pass for those of this one.
        losses = {k: v for k, v in metrics.last.items() if k.split("/")[0] not in runner.probes}
        with suppress(OSError):  # the disk is full
            write_summary(run.folder, summary | losses | {"step": step} | runner.results)
        raise


def probe_again(
    run: Run, history: History, metrics: Metrics, runner: ProbeRunner
) -> dict[str, Any]:
    """End a run without a step left: probes without figures yet add theirs to its summary.

    Returns the summary. Every rank must call this.
    """
    step, total = metrics.step, run.recipe.total_steps
    most = run.config["training"]["max_steps"]
    metrics.say(
        f"already finished at step {step}"
        if step >= total
        else f"already at step {step} of {total}: training.max_steps={most} leaves no step"
    )
    for line in distributed.on_main(lambda: unheeded(run.folder, run.config)):
        metrics.say(line)
    if kept := sorted(history.judged & runner.probes.keys()):
        metrics.say(f"judged before, with the same settings: {', '.join(kept)}")
    runner.probes = {k: probe for k, probe in runner.probes.items() if k not in history.judged}
    try:
        if not (history.summary and history.exported):
            export_net(run, step)
        metrics.record(step, runner(step))
    finally:
        metrics.close()
    summary = facts(run, step, MAX_STEPS, skipped=history.skipped)
    here = {key: summary[key] for key in ("name", "output_dir", "step")}
    summary |= history.summary or history.logged
    summary |= how_it_ended(step, summary["total_steps"])  # older versions defined it otherwise
    return write_summary(run.folder, summary | here | runner.results)


def facts(run: Run, step: int, stopped_by: str, *, skipped: int, alarm: str = "") -> dict[str, Any]:
    """What the summary of a run tells besides its losses and figures."""
    return {
        "name": run.config["name"],
        "output_dir": str(run.folder),
        "step": step,
        "total_steps": run.recipe.total_steps,
        **how_it_ended(step, run.recipe.total_steps, stopped_by),
        "seconds": round(run.checkpoints.seconds, 1),
        "parameters": sum(p.numel() for p in run.recipe.exported.parameters()),
        "skipped_steps": skipped,
        "alarm": alarm,
    }
