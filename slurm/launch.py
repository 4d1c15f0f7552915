"""Start `function(config)` where the config says: here, in several processes, or as a Slurm job.

Under torchrun every process runs the function itself and joins the others. The launcher knows
neither the function nor what the config builds; the cluster's facts come from configs/cluster.
"""

import os
import re
import shutil
import socket
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slurm.job import Function, Job, run_rank
from utils.build import check_targets, plain
from utils.config import fail
from utils.errors import UserError

if TYPE_CHECKING:
    import submitit

KINDS = ("here", "local", "slurm")


def launch(function: Function, config: Mapping[str, Any]) -> Any:
    """Run or submit; returns what the function returns, if it ran in this process.

    A user's mistake prints one line and leaves with code 2, an interrupt with 130; every other
    error is raised on, so that the exit code tells of it.
    """
    try:
        return _launch(function, plain(config))
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def submit(function: Function, config: Mapping[str, Any]) -> "submitit.Job[Any]":
    """Submit a job through submitit and return it; `cluster.executor=local` rehearses it here.

    Raises `UserError` where there is no Slurm or Slurm refuses the job.
    """
    import submitit

    config = plain(config)
    cluster, folder = config["cluster"], Path(config["output_dir"]).absolute()
    executor_name = _executor(cluster)
    # submitit's local executor cannot put the id of a job into the folder of its logs.
    logs = folder if executor_name == "slurm" else Path(str(folder).replace("%j", "local"))
    requeues = {f"{executor_name}_max_num_timeout": cluster["max_requeues"]}
    job = Job(function, {**config, "output_dir": str(folder)})
    asked = parameters(config)
    executor = submitit.AutoExecutor(logs / "slurm", cluster=executor_name, **requeues)
    executor.update_parameters(**asked)
    try:
        with redirect_stderr(StringIO()):  # where submitit repeats what Slurm said
            return executor.submit(job)
    except submitit.core.utils.FailedJobError as error:
        _remove_unsent(logs / "slurm", job, error)
        raise UserError(_refusal(str(error), asked)) from error


def parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """What submitit's executor is told, from the `launcher` and `cluster` parts of a config."""
    launcher, cluster = config["launcher"], config["cluster"]
    count, more = launcher["gpus_per_node"], {}
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
    if cluster["mail"]:
        more = {"slurm_mail_user": cluster["mail"], "slurm_mail_type": "ALL"}
    wanted = {
        "name": re.sub(r"[^\w.-]", "_", str(config["name"])),
        "nodes": launcher["nodes"],
        "tasks_per_node": count,
        "timeout_min": launcher["timeout_min"],
        "cpus_per_task": cluster["cpus_per_task"],
        "mem_gb": cluster["mem_gb"],
        "stderr_to_stdout": True,
        **{
            f"slurm_{key}": cluster[key]
            for key in ("partition", "account", "qos", "constraint", "exclude", "comment")
        },
        "slurm_setup": cluster["setup"] or None,
        # Otherwise the other ranks wait for the one that failed, and keep their nodes.
        "slurm_srun_args": ["--kill-on-bad-exit=1", *cluster["srun_args"]],
        "slurm_signal_delay_s": cluster["signal_delay_s"],
        "local_setup": cluster["setup"] or None,
        "gpus_per_node": count if cluster["executor"] == "local" else None,
        **requests[cluster["gpu_request"]],
        **more,
    }
    return {key: value for key, value in wanted.items() if value is not None}


def _executor(cluster: Mapping[str, Any]) -> str:
    """The name of submitit's executor, if this machine has what it needs."""
    name = cluster["executor"]
    if name not in ("slurm", "local"):
        raise UserError(f"cluster.executor is slurm or local, not {name!r}")
    if name == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise UserError(
            "there is no sbatch on this machine: submit from a node of the cluster, "
            "or run here with launcher=here or launcher=local"
        )
    return name


def _launch(function: Function, config: dict[str, Any]) -> Any:
    launcher = config["launcher"]
    if launcher["kind"] not in KINDS:
        raise UserError(f"launcher.kind is {', '.join(KINDS)}, not {launcher['kind']!r}")
    for key in ("nodes", "gpus_per_node", "timeout_min"):
        if launcher[key] is None or launcher[key] < 1:
            raise UserError(f"launcher.{key} must be at least 1, got {launcher[key]}")
    joins = "TORCHELASTIC_RUN_ID" in os.environ
    if launcher["kind"] == "slurm" and not joins:
        _executor(config["cluster"])
    check_targets(config)
    if joins or launcher["kind"] == "here":
        return Job(function, config)()
    if launcher["kind"] == "local":
        return _run_local(function, config)
    from utils.check import networks

    if "backbone" in config:
        networks(config)  # what a constructor refuses is said now, and not by a job next week
    job = submit(function, config)
    folder = str(Path(config["output_dir"]).absolute()).replace("%j", job.job_id)
    print(f"Submitted job_id: {job.job_id}")
    print(f"Logs and checkpoints will be saved at: {folder}")
    print(f"Follow rank 0: tail -F {job.paths.stdout}")
    if config["cluster"]["executor"] == "slurm":
        print(f"State: squeue -j {job.job_id}; after its end: sacct -j {job.job_id}")
        print(f"Cancel: scancel {job.job_id}")
    return None


def _refusal(said: str, asked: Mapping[str, Any]) -> str:
    """What Slurm said of a job it did not take, and what it was asked for, in one line."""
    pattern = r"^sbatch: (?:error|fatal): (?:Batch job submission failed: )?(.+)"
    reasons = "; ".join(re.findall(pattern, said, re.MULTILINE)) or " ".join(said.split())
    if "configuration source" in reasons:
        return f"Slurm's commands find no cluster here: {reasons}; is SLURM_CONF set as it should?"
    keys = ("nodes", "tasks_per_node", "cpus_per_task", "mem_gb", "timeout_min")
    flags = ("partition", "account", "qos", "constraint", "exclude", "gres", "gpus_per_node")
    words = [f"{key}={asked[key]}" for key in keys if key in asked]
    words += [f"{key}={asked[f'slurm_{key}']}" for key in flags if f"slurm_{key}" in asked]
    return f"Slurm refused the job: {reasons} (asked for {', '.join(words)})"


def _remove_unsent(folder: Path, job: Job, error: Exception) -> None:
    """Delete what submitit wrote for a job that Slurm did not take."""
    from submitit.core.utils import JobPaths

    for path in JobPaths.get_first_id_independent_folder(folder).glob("*.pkl"):
        if job.mark.encode() in path.read_bytes():
            path.unlink()
    for word in getattr(error.__cause__, "cmd", []):
        if Path(word).name.startswith(".submission_file_"):
            Path(word).unlink(missing_ok=True)


def _run_local(function: Function, config: dict[str, Any]) -> None:
    """Several processes on this machine: the first one's output here, all stopped if one fails."""
    from torch import multiprocessing

    count = config["launcher"]["gpus_per_node"]
    if config["launcher"]["nodes"] > 1:
        raise UserError("launcher=local runs on this machine: launcher.nodes must be 1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // count)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # the processes share the cores
    folder = str(Path(config["output_dir"]) / "logs")
    arguments = (Job(function, config), count, port, folder)
    context = multiprocessing.start_processes(run_rank, arguments, count, join=False)
    interrupted = False
    while True:
        try:
            if context.join(grace_period=5):
                break
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True  # the processes got the signal too: let them save and leave
        except multiprocessing.ProcessExitedException as error:
            if interrupted or error.exit_code == 130:
                raise KeyboardInterrupt from None
            raise SystemExit(_said(error, folder)) from None
        except multiprocessing.ProcessRaisedException as error:
            if line := re.search(r"^(?:\w+\.)*UserError: (.+)", str(error), re.MULTILINE):
                raise UserError(line[1]) from None
            print(error, file=sys.stderr)
            raise SystemExit(_said(error, folder)) from None
    if interrupted:
        raise KeyboardInterrupt


def _said(error: Any, folder: str) -> int:
    where = f"; its output: {folder}/rank{error.error_index}.log" if error.error_index else ""
    what = str(error).strip().splitlines()[-1]
    print(f"error: rank {error.error_index} failed: {what}{where}", file=sys.stderr)
    return max(1, getattr(error, "exit_code", 1))
