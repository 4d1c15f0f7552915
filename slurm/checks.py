"""Checks of launcher, cluster and run folder before anything is started; errors of one line."""

import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slurm.cluster import check_executor, facts, parameters, python_command
from utils.errors import UserError
from utils.ranges import check_count, check_range

KINDS = ("here", "local", "slurm")
MAX_WARNING_S = 65535  # sbatch's own limit for --signal


def check_launch(config: Mapping[str, Any], *, joins: bool = False) -> None:
    """Raise `UserError` for settings of launcher, cluster or run folder that cannot work.

    joins: torchrun has started the processes, whatever launcher.kind is.
    """
    launcher = config["launcher"]
    kind = launcher["kind"]
    if kind not in KINDS:
        raise UserError(f"launcher.kind is {', '.join(KINDS)}, not {kind!r}")
    for key in ("nodes", "gpus_per_node", "timeout_min"):
        if launcher[key] is None or launcher[key] < 1:
            raise UserError(f"launcher.{key} must be at least 1, got {launcher[key]}")
    for key in ("nodes", "gpus_per_node"):
        if kind == "here" and not joins and launcher[key] > 1:
            raise UserError(
                f"launcher=here runs one process: launcher.{key}={launcher[key]} is for "
                "launcher=local, launcher=slurm or torchrun"
            )
    if kind == "local" and not joins and launcher["nodes"] > 1:
        raise UserError("launcher=local runs on this machine: launcher.nodes must be 1")
    if kind == "slurm" and not joins:
        check_cluster(config)
        folder = Path(config["output_dir"]).absolute()
        if ":" in str(folder) and facts(config)["snapshot"]:  # PYTHONPATH separates entries by it
            raise UserError(
                f"output_dir: {folder}: the job finds no copy of the code below a folder with a "
                "colon in its name: choose another name, or cluster.snapshot=false"
            )
    _check_folder(str(config["output_dir"]), is_job=kind == "slurm" and not joins)


def check_cluster(config: Mapping[str, Any]) -> None:
    """Raise `UserError` for cluster settings that no job can have."""
    cluster, launcher = facts(config), config["launcher"]
    _check_numbers(cluster)
    warning, limit = cluster["signal_delay_s"], launcher["timeout_min"]
    if limit * 60 <= warning:
        raise UserError(
            f"launcher.timeout_min={limit} is not longer than cluster.signal_delay_s={warning}: "
            f"the job would be told to stop at once; at least {warning // 60 + 1} minutes"
        )
    if cluster["container_image"] and cluster["python"] is None:
        raise UserError(
            "cluster.container_image without cluster.python: name the Python of the image, "
            "such as cluster.python=python3"
        )
    parameters(config)
    if check_executor(cluster) == "local":
        _check_rehearsal(cluster, launcher)


def _check_numbers(cluster: Mapping[str, Any]) -> None:
    if cluster["mem_gb"] is not None:
        check_range("cluster.mem_gb", cluster["mem_gb"])  # 0: all that a node has
    if cluster["cpus_per_task"] is not None:
        check_count("cluster.cpus_per_task", cluster["cpus_per_task"], 1)
    check_count("cluster.signal_delay_s", cluster["signal_delay_s"])
    check_range("cluster.signal_delay_s", cluster["signal_delay_s"], 0, MAX_WARNING_S)
    for key, least in (("max_requeues", 0), ("max_restarts", 0), ("array_parallelism", 1)):
        check_count(f"cluster.{key}", cluster[key], least)


def _check_rehearsal(cluster: Mapping[str, Any], launcher: Mapping[str, Any]) -> None:
    """UserError for what submitit's local executor would raise as a traceback."""
    if launcher["nodes"] > 1:
        raise UserError("cluster.executor=local runs on this machine: launcher.nodes must be 1")
    word = (shlex.split(python_command(cluster)) or [""])[0]
    # A bare name may be on the path once the modules are loaded.
    if ("/" in word or not (cluster["modules"] or cluster["setup"])) and not shutil.which(word):
        raise UserError(
            f"cluster.python: there is no program {word!r} on this machine, where "
            "cluster.executor=local runs the job"
        )


def _check_folder(folder: str, *, is_job: bool) -> None:
    """UserError for %j without a job, and for Slurm's other patterns, such as %x and %u.

    Slurm would replace these in the paths of its logs, and our run folder would be another one.
    """
    if not is_job and "%j" in folder:
        raise UserError(
            f"output_dir: {folder}: %j is the id of a Slurm job, and this run has none: "
            "choose another name"
        )
    if is_job and (other := re.search(r"%(?!j)\S?", folder)):
        raise UserError(
            f"output_dir: {folder}: of Slurm's patterns only %j, the job's id, can be used here, "
            f"not {other[0]}"
        )
