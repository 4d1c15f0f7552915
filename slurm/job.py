"""What runs inside a job: one picklable callable that any process on any machine can start."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

Function = str | Callable[[dict[str, Any]], Any]


class Job:
    """`function(config)`, with the rendezvous of torch.distributed set from submitit's variables.

    `function` may be a dotted name, so that the submitting process need not import it. `%j` in the
    run folder becomes the job's id.
    """

    def __init__(self, function: Function, config: dict[str, Any]) -> None:
        self.function = function
        self.config = config

    def __call__(self) -> Any:
        """Run in this process, as one of the job's tasks."""
        config = dict(self.config)
        if "SUBMITIT_EXECUTOR" in os.environ:
            job_id = _join_peers()
            config["output_dir"] = str(config["output_dir"]).replace("%j", job_id)
        return import_function(self.function)(config)

    def checkpoint(self) -> "DelayedSubmission":
        """What submitit queues when the time is up: the same job, as the run resumes by itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def import_function(function: Function) -> Callable[[dict[str, Any]], Any]:
    """The function itself, for a dotted name too."""
    if callable(function):
        return function
    module, _, name = function.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _join_peers() -> str:
    """Export what torchrun would, and return the job's id."""
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    # Every process keeps sight of all GPUs and takes the one of its local rank, as under torchrun.
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if os.environ["SUBMITIT_EXECUTOR"] == "local":
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # the host's own name need not resolve
    return JobEnvironment().job_id


def run_rank(rank: int, job: Job, world_size: int, port: int, folder: str) -> None:
    """One of several processes on this machine; the output of all but the first goes to files."""
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
