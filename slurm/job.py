"""What runs inside a job: one picklable callable that any process on any machine can start."""

import importlib
import os
import signal
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from slurm import record
from utils.errors import UserError
from utils.mistakes import mistakes_told
from utils.signals import heeded

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

Function = str | Callable[[dict[str, Any]], Any]


class Job:
    """`function(config)`, with the rendezvous of torch.distributed set from submitit's variables.

    `function` may be a dotted name, so that the submitting process need not import it. `%j` in the
    run folder becomes the job's id; in a job array, the id that its jobs share.
    """

    def __init__(self, function: Function, config: dict[str, Any]) -> None:
        self.function = function
        self.config = config
        self.mark = uuid.uuid4().hex  # identifies the pickle file of this job

    def __call__(self) -> Any:
        """Run in this process, as one of the job's tasks."""
        config = dict(self.config)
        if "SUBMITIT_EXECUTOR" not in os.environ:
            return self._run(config)
        job_id = _join_peers()
        if os.environ["SUBMITIT_EXECUTOR"] == "slurm":
            _leave_when_told()
        # The jobs of an array share the id before the underscore.
        folder = str(config["output_dir"]).replace("%j", job_id.split("_")[0])
        config["output_dir"] = folder
        facts = {"kind": "slurm", "processes": int(os.environ["WORLD_SIZE"])}
        with _failure_shown(), record.attempt(Path(folder), job=job_id, **facts):
            return self._run(config)

    def _run(self, config: dict[str, Any]) -> Any:
        with mistakes_told():
            return import_function(self.function)(config)

    def checkpoint(self) -> "DelayedSubmission":
        """The job that submitit resubmits at the time limit: the same one, as the run resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def import_function(function: Function) -> Callable[[dict[str, Any]], Any]:
    """The function, imported if it is given by a dotted name."""
    if callable(function):
        return function
    module, _, name = function.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _join_peers() -> str:
    """Set the environment variables that torchrun would set; returns the job's id."""
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    # Every process sees all GPUs and uses the one of its local rank, as under torchrun.
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if os.environ["SUBMITIT_EXECUTOR"] == "local":
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # the host's own name need not resolve
    elif (address := os.environ.get("SLURM_LAUNCH_NODE_IPADDR")) and not _resolves():
        os.environ["MASTER_ADDR"] = address  # a node's name in Slurm need not be its host's
    return JobEnvironment().job_id


def _leave_when_told() -> None:
    """Exit with 128 plus the signal's number when told to; slurm/after.sh requeues the job.

    INT stays KeyboardInterrupt. A training saves a checkpoint first. submitit would requeue from
    inside the job, where a container may lack Slurm's commands.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in heeded():
        if number != signal.SIGINT:
            signal.signal(number, leave)


@contextmanager
def _failure_shown() -> Iterator[None]:
    """Report a failure of another rank in rank 0's output too, which is the one users follow."""
    from submitit import JobEnvironment
    from submitit.core.utils import JobPaths

    try:
        yield
    except Exception as error:
        if isinstance(error, UserError):
            sys.tracebacklimit = 0  # Python prints the error: one line without a traceback
        job = JobEnvironment()
        if job.global_rank:
            followed = JobPaths(job.paths.folder, job.job_id, 0).stdout
            what = record.in_one_line(error)
            with suppress(OSError), followed.open("a") as file:
                file.write(
                    f"error: rank {job.global_rank} failed: {what}; "
                    f"its output: {job.paths.stdout}\n"
                )
        raise


def _resolves() -> bool:
    """Whether the host name in MASTER_ADDR, of rank 0's node, resolves."""
    try:
        return bool(socket.getaddrinfo(os.environ["MASTER_ADDR"], None))
    except OSError:
        return False


def run_rank(rank: int, job: Job, world_size: int, port: int, folder: str) -> None:
    """Run one rank of several on this machine; ranks above 0 print to `folder`/rank<r>.log."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    if rank:
        Path(folder).mkdir(parents=True, exist_ok=True)
        log = os.open(
            Path(folder) / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
        )
        os.dup2(log, 1)
        os.dup2(log, 2)
    job()
