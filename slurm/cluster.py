"""Translate a cluster's settings (configs/cluster) for submitit and the batch script."""

import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError

DEFAULTS = Path(__file__).resolve().parent.parent / "configs" / "cluster" / "default.yaml"
_PASSED = ("partition", "account", "qos", "constraint", "exclude", "comment", "array_parallelism")


def facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `cluster` part of a config, with defaults for keys that an older file lacks.

    A null list or mapping is empty, and null items of one are dropped.
    """
    import yaml

    defaults = yaml.safe_load(DEFAULTS.read_text())
    found = {**defaults, **config["cluster"]}
    for key, default in defaults.items():
        if isinstance(default, list):
            found[key] = [value for value in found[key] or [] if value is not None]
        elif isinstance(default, dict):
            found[key] = {k: value for k, value in (found[key] or {}).items() if value is not None}
    return found


def parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of submitit's executor, from the `launcher` and `cluster` parts of a config."""
    launcher, cluster = config["launcher"], facts(config)
    count = launcher["gpus_per_node"]
    typed = f"{cluster['gpu_type']}:{count}" if cluster["gpu_type"] else count
    requests = {
        "gpus_per_node": {"slurm_gpus_per_node": typed},
        "gres": {"slurm_gres": f"gpu:{typed}"},
        "none": {},
    }
    if cluster["gpu_request"] not in requests:
        raise UserError(
            f"cluster.gpu_request is {', '.join(requests)}, not {cluster['gpu_request']!r}"
        )
    more: dict[str, Any] = {"requeue": True, **cluster["sbatch_options"]}
    if cluster["mail"]:
        more |= {"mail-user": cluster["mail"], "mail-type": cluster["mail_type"]}
    wanted = {
        "name": re.sub(r"[^\w.-]", "_", str(config["name"])),
        "nodes": launcher["nodes"],
        "tasks_per_node": count,
        "timeout_min": launcher["timeout_min"],
        "cpus_per_task": cluster["cpus_per_task"],
        "mem_gb": cluster["mem_gb"],
        "stderr_to_stdout": True,
        **{f"slurm_{key}": cluster[key] for key in _PASSED},
        "slurm_srun_args": _srun_arguments(cluster),
        "slurm_signal_delay_s": cluster["signal_delay_s"],
        "setup": _setup(cluster),
        **requests[cluster["gpu_request"]],
        "slurm_additional_parameters": more,
    }
    return {key: value for key, value in wanted.items() if value is not None}


def python_command(cluster: Mapping[str, Any]) -> str:
    """Shell words that start Python on a node: the path of an interpreter, or a command."""
    command = sys.executable if cluster["python"] is None else str(cluster["python"])
    # A command may have several words; a path is a single one, even with spaces.
    return shlex.quote(command) if Path(command).is_file() else command


def check_executor(cluster: Mapping[str, Any]) -> str:
    """The name of submitit's executor."""
    if cluster["executor"] not in ("slurm", "local"):
        raise UserError(f"cluster.executor is slurm or local, not {cluster['executor']!r}")
    return cluster["executor"]


def check_machine(cluster: Mapping[str, Any]) -> None:
    """Raise `UserError` unless this machine can submit."""
    lacks = not (shutil.which("sbatch") and shutil.which("srun"))
    if check_executor(cluster) == "slurm" and lacks:
        raise UserError(
            "there is no sbatch on this machine: submit from a node of the cluster, "
            "or run here with launcher=here or launcher=local"
        )


def refusal(said: str, asked: Mapping[str, Any]) -> str:
    """One line with Slurm's reason for refusing a job, and what the job asked for."""
    pattern = r"^sbatch: (?:error|fatal): (?:Batch job submission failed: )?(.+)"
    reasons = "; ".join(re.findall(pattern, said, re.MULTILINE)) or " ".join(said.split())
    reasons = reasons or "it gave no reason"
    if "configuration source" in reasons:
        return f"Slurm's commands find no cluster here: {reasons}; is SLURM_CONF set as it should?"
    keys = ("nodes", "tasks_per_node", "cpus_per_task", "mem_gb", "timeout_min")
    flags = ("partition", "account", "qos", "constraint", "exclude", "gres", "gpus_per_node")
    words = [f"{key}={asked[key]}" for key in keys if key in asked]
    words += [f"{key}={asked[f'slurm_{key}']}" for key in flags if f"slurm_{key}" in asked]
    return f"Slurm refused the job: {reasons} (asked for {', '.join(words)})"


def _srun_arguments(cluster: Mapping[str, Any]) -> list[str]:
    # Otherwise the other ranks would wait for a failed one and hold their nodes.
    words = ["--kill-on-bad-exit=1"]
    if cluster["cpus_per_task"]:
        # Since Slurm 22.05 srun does not inherit it from the job: each rank would have one CPU.
        words.append(f"--cpus-per-task={cluster['cpus_per_task']}")
    if cluster["container_image"]:
        words.append(f"--container-image={cluster['container_image']}")
    if cluster["container_mounts"]:
        words.append(f"--container-mounts={','.join(cluster['container_mounts'])}")
    return [*words, *cluster["srun_args"]]


def _setup(cluster: Mapping[str, Any]) -> list[str]:
    """Shell lines to run before the processes: modules, variables, then cluster.setup."""
    for name in cluster["env"]:
        if not re.fullmatch(r"[A-Za-z_]\w*", str(name)):
            raise UserError(f"cluster.env: {name!r} is no name of an environment variable")
    modules = [f"module load {shlex.quote(str(module))}" for module in cluster["modules"]]
    # A value may refer to other variables, such as $USER or $SLURM_JOB_ID.
    values = {k: re.sub(r'(["`\\])', r"\\\1", str(v)) for k, v in cluster["env"].items()}
    variables = [f'export {name}="{value}"' for name, value in values.items()]
    return [*modules, *variables, *cluster["setup"]]
