"""The command line of the published segmentation evaluation, and ours, as overrides of a config.

Published: `model_path=FILE model_loader_kwargs.KEY=VALUE ... distributed=True KEY=VALUE ...`, where
other keys are options of sbatch. Ours: `OUTPUT --model NAME --weights FILE --tasks TASK ...`.
"""

import os
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.config.build import plain
from utils.config.command_line import (
    Takes,
    backbone_words,
    files_beside,
    names_backbone,
    quoted,
    read_command,
    refuse_unknown_flags,
    sorted_words,
    tell,
)
from utils.config.compose import OWN_FILE, parse_config
from utils.config.files import CONFIGS
from utils.config.flags import slurm_minutes
from utils.errors import UserError, fail
from utils.nearest import nearest

CONFIG = "eval/segmentation.yaml"
EMBEDDED = "seg_scenes"
LOADER = "dinov2_loader.py"
# Names of the published loader -> our backbones.
MODELS = {
    f"dinov2_{published.format(letter)}": f"{ours}_vit_{size}_patch16"
    for letter, size in (("l", "large"), ("h", "huge"))
    for published, ours in (
        ("vit{}16", "dinov2"),
        ("hybrid_vit{}16", "hybrid_dinov2"),
        ("vit{}16_inv_early", "d8_inv_early_dinov2"),
    )
}
# sbatch's options -> our keys.
SBATCH = {
    "account": "cluster.account",
    "partition": "cluster.partition",
    "qos": "cluster.qos",
    "constraint": "cluster.constraint",
    "exclude": "cluster.exclude",
    "comment": "cluster.comment",
    "mail_user": "cluster.mail",
    "cpus_per_task": "cluster.cpus_per_task",
    "mem": "cluster.mem_gb",
    "nodes": "launcher.nodes",
    "ntasks_per_node": "launcher.gpus_per_node",
    "gpus_per_node": "launcher.gpus_per_node",
    "time": "launcher.timeout_min",
    "timeout": "launcher.timeout_min",
}
OURS = (
    *("backbone", "data", "probes", "probe", "launcher", "cluster", "name", "output_dir"),
    *("weights", "seed", "device"),
)
PUBLISHED_TIMEOUT_MIN = 500
# A data set by a part of its tasks' names: the flag of its folder, the variable that may hold it.
ROOTS = {"ade20k": ("--ade20k-root", "ADE20K_PATH"), "voc2012": ("--voc-root", "VOC_PATH")}
OPTIONS = {
    "--batch-size": "batch_size",
    "--num-workers": "num_workers",
    "--precision": "precision",
    "--resolution": "resolution",
    "--scratch-dir": "scratch_dir",
}
OWN = ("--tasks", *(flag for flag, _ in ROOTS.values()), *OPTIONS)
SAME = {"--pretrained-weights": "--weights"}
HELP = {
    "--weights FILE": "every key must fit; also --pretrained-weights",
    "--tasks TASK ...": "which of configs/probe/seg_*.yaml, or of probe/*.yaml beside the config "
    "file; by default those with a known folder",
    "--ade20k-root DIR": "folder that holds ADEChallengeData2016; also ADE20K_PATH",
    "--voc-root DIR": "folder that holds VOCdevkit/VOC2012; also VOC_PATH",
    **{f"{flag} X": f"probes.TASK.{key} of every task" for flag, key in OPTIONS.items()},
    "model_path=FILE": f"published: {LOADER}, or any file with __model_loader__(**arguments)",
    "model_loader_kwargs.K=V": "published: its arguments",
    "distributed=True": "published: a Slurm job; options of sbatch as key=value",
}


class _Asked(NamedTuple):
    """The words of a command line, by kind; filled while they are read."""

    rest: list[str]  # for utils.config.compose
    tasks: list[str]
    roots: dict[str, str]  # data set -> folder
    options: dict[str, str]  # keyword of every task's probe -> value
    loader: dict[str, str]  # model_loader_kwargs
    published: dict[str, str]  # model_path, distributed
    sbatch: dict[str, str]
    notes: list[str]


def parse_segmentation(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config an evaluation's command line asks for; a mistake prints one line, exit code 2."""
    words, notes = read_command(argv, read_segmentation_arguments, page=_help())
    config = plain(
        parse_config(default=CONFIG, argv=words, base="evaluate", further=lambda _: notes)
    )
    for task, node in config["probes"].items():
        for data, (flag, variable) in ROOTS.items():
            if node and task.endswith(data) and not node["train"].get("root", True):
                fail(f"{task} needs the folder of its images: {flag} DIR, or {variable}=DIR")
    tell(notes)
    return config | {"backbone_named": names_backbone(words)}


def read_segmentation_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides for the words of a command line, and notes; flags of all scripts pass."""
    refuse_unknown_flags(argv, OWN)
    named = any(word.partition("=")[0] == "--tasks" for word in argv)
    own = files_beside(argv, "probe") if named else {}
    asked = _read(argv, own)
    words = [*_model(asked), *_launcher(asked)]
    named_file = any(word.split("=")[0] in ("--config-file", "--config") for word in asked.rest)
    tasks = _tasks(asked, named_file, own)
    words += [f"+probe@probes.{task}={task}" for task in tasks]
    for task in tasks:
        for key, value in asked.options.items():
            if task.startswith("seg_linear") and key == "batch_size":
                key = "batch_size_per_gpu"  # it trains, and keeps the effective batch
            words.append(f"probes.{task}.{key}={_quoted(value)}")
        for data, root in asked.roots.items():
            words += [f"probes.{task}.train.root={_quoted(root)}"] if data in task else []
    return words + asked.rest, asked.notes


def known_tasks() -> list[str]:
    """The tasks by their config files."""
    return sorted(path.stem for path in (CONFIGS / "probe").glob("seg_*.yaml"))


def _read(argv: Sequence[str], own: Collection[str]) -> _Asked:
    asked, output = _Asked([], [], {}, {}, {}, {}, {}, []), ""
    roots = {flag: data for data, (flag, _) in ROOTS.items()}
    takes: dict[str, Takes] = dict.fromkeys((*roots, *OPTIONS, "--weights", "--model"), 1)
    told = {"--tasks": ", ".join(known_tasks())}
    takes["--tasks"] = lambda word: word.startswith("seg_") or word in own
    for name, values in sorted_words(argv, takes, same=SAME, told=told):
        value = values[0]
        if name == "--tasks":
            asked.tasks.extend(task for word in values for task in word.split(","))
        elif name == "--weights":
            asked.rest.append(f"weights={_quoted(value)}")
        elif name == "--model":
            asked.rest.extend(backbone_words(value, argv))
        elif name in roots:
            asked.roots[roots[name]] = value
        elif name in OPTIONS:
            asked.options[OPTIONS[name]] = value
        elif value.startswith("-"):
            asked.rest.extend(values)
        elif "=" in value or value.startswith("~"):
            _read_override(asked, value)
        elif output:
            raise UserError(f"two output folders, {output!r} and {value!r}")
        else:
            output = value
            asked.rest.append(f"output_dir={_quoted(value)}")
    return asked


def _read_override(asked: _Asked, word: str) -> None:
    name, _, value = word.partition("=")
    key = name.replace("-", "_")
    if name.startswith("model_loader_kwargs."):
        asked.loader[name.removeprefix("model_loader_kwargs.")] = value
    elif name in ("model_path", "distributed"):
        asked.published[name] = value
    elif key in SBATCH:
        asked.sbatch[key] = value
    elif name == "output_dir":
        asked.rest.append(f"output_dir={_quoted(value)}")
    elif re.split(r"[.@]", name.lstrip("+~"))[0] in OURS:
        asked.rest.append(word)
    else:
        raise UserError(_unknown_key(name))


def _unknown_key(name: str) -> str:
    hint = nearest(name.replace("-", "_"), [*SBATCH, *OURS, "model_path", "distributed"])
    keys = "setup, srun_args, gpu_request, gpu_type, signal_delay_s, max_requeues"
    return (
        f"unknown key {name!r}{hint}: of sbatch's options {', '.join(SBATCH)} are understood; what "
        f"else the cluster needs goes into a file configs/cluster/NAME.yaml ({keys}), chosen by "
        "cluster=NAME; keys of a probe are probes.TASK.KEY"
    )


def _model(asked: _Asked) -> list[str]:
    """The backbone and its weights for model_path and model_loader_kwargs."""
    path, arguments = asked.published.get("model_path"), dict(asked.loader)
    if path is None:
        if arguments:
            raise UserError("model_loader_kwargs without model_path; or use --model and --weights")
        return []
    name = arguments.get("model_name", "")
    if Path(path).name == LOADER and (name in MODELS or not Path(path).is_file()):
        if name not in MODELS:
            known = ", ".join(MODELS)
            raise UserError(
                f"unknown model_loader_kwargs.model_name {name!r}{nearest(name, MODELS)} ({known})"
            )
        unknown = sorted(set(arguments) - {"model_name", "weights", "device"})
        if unknown:
            raise UserError(f"{LOADER} takes model_name, weights and device, not {unknown[0]!r}")
        if "device" in arguments:
            asked.notes.append("model_loader_kwargs.device has no effect; use device=cpu or cuda")
        words = [f"backbone={MODELS[name]}"]
        if "weights" in arguments:
            words.append(f"weights={_quoted(arguments['weights'])}")
        return words
    if not Path(path).is_file():
        raise UserError(
            f"model_path={path}: no such file; it is {LOADER} for the published models, or a file "
            "of yours that defines __model_loader__(**arguments)"
        )
    words = ["backbone=file", f"backbone.path={_quoted(str(Path(path).absolute()))}"]
    return words + [f"+backbone.arguments.{key}={value}" for key, value in arguments.items()]


def _launcher(asked: _Asked) -> list[str]:
    """Launcher overrides: a Slurm job for distributed=True or options of sbatch, else here."""
    said = asked.published.get("distributed")
    if said is not None and said.lower() not in ("true", "false"):
        raise UserError(f"distributed is True or False, not {said!r}")
    if said is None and not asked.sbatch:
        return []
    named = any(word.startswith("launcher=") for word in asked.rest)
    if said is not None and said.lower() == "false":
        if asked.sbatch:
            given = ", ".join(asked.sbatch)
            asked.notes.append(f"no job is submitted (distributed=False): {given} have no effect")
        return [] if named else ["launcher=here"]
    values: dict[str, str] = {"launcher.timeout_min": str(PUBLISHED_TIMEOUT_MIN)}
    set_by: dict[str, str] = {}
    for option, value in asked.sbatch.items():
        key, converted = SBATCH[option], _sbatch_value(option, value)
        if key in set_by and values[key] != converted:
            first = set_by[key]
            why = ": there is one process per GPU" if key == "launcher.gpus_per_node" else ""
            raise UserError(f"{first}={asked.sbatch[first]} and {option}={value} disagree{why}")
        values[key], set_by[key] = converted, option
    words = [] if named else ["launcher=slurm"]
    return words + [f"{key}={value}" for key, value in values.items()]


def _sbatch_value(option: str, value: str) -> str:
    if option in ("time", "timeout"):
        try:
            return str(slurm_minutes(value))
        except ValueError:
            raise UserError(f"{option}={value}: a time is minutes, H:M:S or D-H:M") from None
    if option == "mem":
        match = re.fullmatch(r"(\d+)([GM]?)B?", value.upper())
        if match is None:
            raise UserError(f"mem={value}: memory per node is written 240G")
        number = int(match[1])
        return str(number if match[2] == "G" else -(-number // 1024))
    if option in ("nodes", "ntasks_per_node", "gpus_per_node", "cpus_per_task"):
        if not value.isdecimal():
            raise UserError(f"{option}={value}: a whole number is needed")
        return value
    return _quoted(value)


def _tasks(asked: _Asked, named_file: bool, own: Collection[str]) -> list[str]:
    """The tasks to run: those named, else those with keys or folders, else the embedded scenes.

    own: probes of files beside the run file, which may be named too.
    """
    known = sorted({*known_tasks(), *own})
    for task in asked.tasks:
        if task not in known:
            hint = nearest(task, known)
            mine = "" if hint else f"; {OWN_FILE.format(f'probe/{task}')}"
            raise UserError(f"unknown task {task!r}{hint} ({', '.join(known)}){mine}")
    if asked.tasks or named_file:
        return list(dict.fromkeys(asked.tasks))
    keys = [re.match(r"\+*probes\.(\w+)", word) for word in asked.rest]
    found = [task for task in known if task in {key[1] for key in keys if key}]
    for data, (_, variable) in ROOTS.items():
        if (data in asked.roots or os.environ.get(variable)) and f"seg_{data}" not in found:
            found.append(f"seg_{data}")
    if not found:
        flags = " and ".join(flag for flag, _ in ROOTS.values())
        asked.notes.append(f"no --tasks, and no folder ({flags}): judging on the embedded scenes")
    return found or [EMBEDDED]


def _quoted(value: str) -> str:
    """A value in Hydra's override grammar; numbers stay numbers."""
    return value if value.isdecimal() else quoted(value)


def _help() -> str:
    lines = [
        f"{sys.modules['__main__'].__doc__ or ''}",
        "words of this evaluation (they come before those below of the same name):",
    ]
    lines += [f"  {word:<24} {what}" for word, what in HELP.items()]
    lines.append(f"tasks: {', '.join(known_tasks())}")
    return "\n".join(lines) + "\n\nall other flags and keys:\n"
