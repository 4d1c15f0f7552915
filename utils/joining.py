"""How a process joins its peers: its place among them, its device, and where they meet.

A process learns its place from torchrun's variables, else from submitit's local executor, else from
a Slurm step, else it is alone. Torchrun comes first because it may run inside a Slurm allocation.
"""

import datetime
import gc
import os
import re
import socket
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist

from utils.distributed import joined
from utils.environment import whole_number
from utils.errors import UserError
from utils.host_memory import keep_freed_memory
from utils.signals import ended_by_signals

NAMED_WITHIN_S = 60


class Process(NamedTuple):
    """The place of one process among its peers."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0


def find_process(env: Mapping[str, str] | None = None) -> Process:
    """This process's place according to the environment.

    Raises UserError if it is half given, or no place among so many processes.
    """
    process = _read_process(os.environ if env is None else env)
    if not 0 <= process.rank < process.world_size:  # it would wait for peers that never come
        raise UserError(
            f"the environment says rank {process.rank} of {process.world_size} processes (RANK and "
            "WORLD_SIZE, or Slurm's); ranks begin at 0 and are below the number of processes"
        )
    return process


def _read_process(env: Mapping[str, str]) -> Process:
    if "RANK" in env or "WORLD_SIZE" in env:
        needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in needed if name not in env]
        if missing:
            raise UserError(
                f"variables of torchrun missing: {', '.join(missing)}; set them or unset the rest"
            )
        rank = whole_number("RANK", env=env)
        return Process(
            rank,
            whole_number("LOCAL_RANK", rank, env),
            whole_number("WORLD_SIZE", env=env),
            env["MASTER_ADDR"],
            _port(env, ""),
        )
    if "SUBMITIT_LOCAL_GLOBALID" in env:
        return Process(
            whole_number("SUBMITIT_LOCAL_GLOBALID", env=env),
            whole_number("SUBMITIT_LOCAL_LOCALID", env=env),
            whole_number("SUBMITIT_LOCAL_NTASKS", env=env),
            "127.0.0.1",
            _port(env, env.get("SUBMITIT_LOCAL_JOB_ID", "")),
        )
    # SLURM_STEP_ID exists only below srun: a plain python in a batch script or an interactive shell
    # is alone.
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "127.0.0.1"))
        return Process(
            whole_number("SLURM_PROCID", env=env),
            whole_number("SLURM_LOCALID", 0, env),
            whole_number("SLURM_STEP_NUM_TASKS", whole_number("SLURM_NTASKS", 1, env), env),
            env["MASTER_ADDR"] if "MASTER_ADDR" in env else first_host(nodes),
            _port(env, env.get("SLURM_JOB_ID", "") + "." + env["SLURM_STEP_ID"]),
        )
    return Process()


def first_host(nodes: str) -> str:
    """First host of a Slurm node list: `gpu[03-05,9]-ib,x` is `gpu03-ib`, `r[1-2]n[3-4]` `r1n3`."""
    first = re.match(r"(?:[^,\[\]]|\[[^\]]+\])+", nodes)
    if first is None:
        raise UserError(f"no host in the Slurm node list {nodes!r}")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


@contextmanager
def session(device: str = "auto", *, timeout_min: float = 30) -> Iterator[torch.device]:
    """Join the process group for the duration of a `with` block; yields this process's device."""
    ours = not joined()
    yield setup(device, timeout_min=timeout_min)
    # Not in a finally: after an exception the peers may hang in a collective we would wait for.
    if ours and joined():
        # Sharded networks hold groups in reference cycles; a group that lives on into the
        # interpreter's end now and then aborts the process from one of its threads.
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()


def setup(device: str = "auto", *, timeout_min: float = 30) -> torch.device:
    """Choose the device and join the peers, if any: nccl for CUDA, gloo for CPU tensors.

    `device` is auto, cpu, cuda or cuda:<index>. Raises UserError when the machine does not have it.
    On a CPU freed memory stays with the process.
    """
    process = find_process()
    chosen = _choose_device(device, process)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    else:
        keep_freed_memory()
    if process.world_size > 1 and not joined():
        with _meeting(process), ended_by_signals():  # the others may not come for half an hour
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
                init_method="env://"  # torchrun keeps the store itself
                if "RANK" in os.environ
                else f"tcp://{process.address}:{process.port}",
                rank=process.rank,
                world_size=process.world_size,
                timeout=datetime.timedelta(minutes=timeout_min),
            )
    return chosen


@contextmanager
def _meeting(process: Process) -> Iterator[None]:
    """UserError for a place that the user named and where the processes cannot meet."""
    _wait_for_name(process.address)
    try:
        yield
    except dist.DistNetworkError as error:
        chosen = "MASTER_PORT" in os.environ and "SUBMITIT_EXECUTOR" not in os.environ
        if not chosen or "EADDRINUSE" not in str(error):  # a job of ours starts again
            raise
        raise UserError(
            f"port {process.port} of this machine is in use by another program; choose another "
            "MASTER_PORT (torchrun --master-port)"
        ) from None


def _wait_for_name(address: str) -> None:
    """A cluster may learn a machine's name as its job starts; torch would ask for half an hour."""
    until = time.monotonic() + NAMED_WITHIN_S
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except socket.gaierror as error:
            if time.monotonic() > until:
                raise UserError(
                    f"there is no machine {address}, where the processes are to meet: "
                    f"{error.strerror} (MASTER_ADDR)"
                ) from None
        time.sleep(1)


def check_device(device: str) -> None:
    """UserError for a name that no device has, whether this machine has one or not."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(device)):
        raise UserError(f"device={device} is unknown; choose auto, cpu, cuda or cuda:<index>")


def _port(env: Mapping[str, str], job: str) -> int:
    # A function of the job, so that all its processes agree without talking; below Linux's
    # ephemeral ports.
    if "MASTER_PORT" not in env:
        return 20000 + zlib.crc32(job.encode()) % 12000
    if not 0 <= (port := whole_number("MASTER_PORT", env=env)) < 2**16:
        raise UserError(f"MASTER_PORT is {port}; ports are numbers below {2**16}")
    return port


def _choose_device(device: str, process: Process) -> torch.device:
    check_device(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device(device)
    count = torch.cuda.device_count()
    if count == 0:
        raise UserError("device=cuda, but torch sees no GPU here; use device=cpu or device=auto")
    if ":" in device:
        if (index := int(device.removeprefix("cuda:"))) >= count:
            seen = "cuda:0 alone" if count == 1 else f"cuda:0 to cuda:{count - 1}"
            raise UserError(f"device={device}, but torch sees {seen} here")
        return torch.device("cuda", index)
    # A launcher that binds one GPU to each task leaves only index 0 visible.
    index = 0 if count == 1 else process.local_rank
    if index >= count:
        raise UserError(
            f"process {process.local_rank} of this machine has no GPU: {count} are visible"
        )
    return torch.device("cuda", index)
