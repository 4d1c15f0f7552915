"""The run folder: resolved config, revision of the code, and what changed since its last use."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from utils.checkpoints.checkpoint import Checkpoints
from utils.errors import UserError, one_line
from utils.revision import revision
from utils.run_files import CODE, CONFIG
from utils.whole_file import write_text

# Keys that change where, how fast or how closely watched a run is, but not the weights that come
# out; training.weights is read where there is no run to go on with.
HARMLESS = (
    *("name", "output_dir", "device", "launcher", "cluster", "logging", "probes", "probe_every"),
    *("checkpoint", "recipe.num_workers", "data.val"),
    *("training.resume", "training.weights", "training.max_steps", "training.log_every"),
    *("training.hang_timeout_s", "training.compile", "training.activation_checkpointing"),
)

BATCH = "images_per_step"


def refuse_overwriting(folder: Path, checkpoints: Checkpoints) -> None:
    """Raise UserError where a run that is not to be resumed has its folder taken."""
    if steps := checkpoints.steps():
        raise UserError(
            f"{folder} holds a run at step {steps[-1]}: choose "
            "another output_dir, remove it, or let training.resume=true continue it"
        )


def prepare_folder(folder: Path, config: Mapping[str, Any], checkpoints: Checkpoints) -> list[str]:
    """Write config.yaml and git.txt; returns lines for the log. Rank 0 only.

    An earlier config.yaml with other values is kept as config.<n>.yaml. The lines name changed keys
    that affect results, and a changed plan (`changed_plan`). Call this once the run is sure to
    start: a command that is refused (for weights of another model, say) must not replace it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG
    notes = changed_plan(config, checkpoints)
    if path.exists():
        earlier = saved_config(path)
        if earlier != _plain(config):
            kept = _free_name(folder)
            path.rename(kept)
            changes = changed_keys(earlier, _plain(config)) if checkpoints.steps() else []
            if changes:
                notes += [
                    f"WARNING: {folder} was begun with another config ({kept.name}); "
                    "changed since, with effect:"
                ]
                notes += [f"  {change}" for change in changes]
    # Legible, and each value on one line, as slurm.runs looks for the name without reading YAML.
    text = yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True, width=10_000)
    write_text(path, text)
    write_text(folder / CODE, describe_code() + "\n")
    return notes


def saved_config(path: Path) -> dict[str, Any]:
    """The config.yaml of a run folder; UserError for one that is none."""
    try:
        content = yaml.safe_load(path.read_text("utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML ({one_line(error)}): mend or remove it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no mapping of keys to values: mend or remove it")
    return content


def changed_keys(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> list[str]:
    """Lines `key: old -> new` for the keys that change results."""
    old, new = _relevant(earlier), _relevant(later)
    keys = [*old, *(key for key in new if key not in old)]
    return [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in keys
        if old.get(key) != new.get(key)
    ]


def unheeded(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """A warning where no step is left for keys that changed since the run was trained."""
    path = folder / CONFIG
    changes = changed_keys(saved_config(path), _plain(config)) if path.exists() else []
    if not changes:
        return []
    told = ", ".join(changes)
    return [f"WARNING: without a step to train, changes have no effect in {folder}: {told}"]


def changed_plan(config: Mapping[str, Any], checkpoints: Checkpoints) -> list[str]:
    """A warning where a run resumes with other numbers of steps or images than its checkpoint's.

    They follow from the number of processes, which the config does not name.
    """
    before, now = checkpoints.plan_before, checkpoints.plan
    changed = [key for key in now if before.get(key, now[key]) != now[key]]
    if not changed:
        return []
    told = ", ".join(f"{key.replace('_', ' ')} {before[key]} -> {now[key]}" for key in changed)
    line = f"WARNING: the run goes on with another plan, by which its schedules go: {told}"
    if BATCH in changed:
        known = "effective_batch_size" in (config.get("recipe") or {})
        kept = f"; recipe.effective_batch_size={before[BATCH]}" if known else ""
        kept = kept or "; as many processes and images for each as before"
        line += f"{kept} would keep the batch"
    return [line]


def describe_code() -> str:
    """Git revision of this code (with -dirty if changed), and torch's version."""
    return f"{revision(Path(__file__).resolve().parent.parent)} torch {torch.__version__}"


def _relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = _flat(config)
    return {
        k: v for k, v in flat.items() if not any(k == h or k.startswith(f"{h}.") for h in HARMLESS)
    }


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {
            k: v for name, item in value.items() for k, v in _flat(item, f"{prefix}{name}.").items()
        }
    return {prefix[:-1]: value}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    # As the file will give it back: tuples are lists in YAML.
    return json.loads(json.dumps(config, default=str))


def _free_name(folder: Path) -> Path:
    number = 1
    while (folder / f"config.{number}.yaml").exists():
        number += 1
    return folder / f"config.{number}.yaml"
