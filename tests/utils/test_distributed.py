"""A process finds its place, whoever started it; the helpers work alone and in company."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from utils import distributed, parallel
from utils.distributed import Process, find_process, first_host
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[02-03]",
}
SUBMITIT = {
    "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_LOCALID": "1",
    "SUBMITIT_LOCAL_NTASKS": "2",
    "SUBMITIT_LOCAL_JOB_ID": "123",
}


def test_alone():
    assert find_process({}) == Process(0, 0, 1)


def test_torchrun_comes_first():
    assert find_process({**SLURM, **SUBMITIT, **TORCHRUN}) == Process(5, 1, 8, "head", 29500)


def test_half_of_torchruns_variables_are_refused_by_name():
    with pytest.raises(UserError, match="MASTER_ADDR, MASTER_PORT"):
        find_process({"RANK": "0", "WORLD_SIZE": "2"})


def test_slurm_step():
    place = find_process(SLURM)
    assert place[:4] == (3, 1, 4, "gpu02")
    assert place.port == find_process({**SLURM, "SLURM_PROCID": "0"}).port
    assert place.port != find_process({**SLURM, "SLURM_JOB_ID": "78"}).port


def test_a_slurm_batch_script_without_srun_is_alone():
    assert (
        find_process({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == Process()
    )


def test_submitit_local():
    assert find_process(SUBMITIT)[:4] == (1, 1, 2, "127.0.0.1")
    assert find_process({**SUBMITIT, "SLURM_JOB_ID": "1"})[:3] == (1, 1, 2)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node7", "node7"),
        ("a1,a2", "a1"),
        ("gpu[003-005,9]", "gpu003"),
        ("gpu[3,9]-ib,x", "gpu3-ib"),
        ("r[1-2]", "r1"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


def test_helpers_alone():
    tensor = torch.arange(3.0)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    distributed.barrier()
    assert distributed.all_reduce_mean(tensor) is distributed.all_reduce_sum(tensor) is tensor
    assert distributed.all_gather_variable(tensor) is tensor
    assert distributed.gather_objects("x") == ["x"]
    assert distributed.broadcast_object("x") == "x"


def test_no_gpu_is_said():
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU"):
            distributed.setup("cuda")
        assert distributed.setup("auto") == torch.device("cpu")


def test_helpers_in_company(tmp_path):
    mp.spawn(_company, args=(2,), nprocs=2)


def _company(rank: int, world: int) -> None:
    # As submitit's local executor starts it.
    os.environ |= {
        **SUBMITIT,
        "SUBMITIT_LOCAL_GLOBALID": str(rank),
        "SUBMITIT_LOCAL_LOCALID": str(rank),
    }
    os.environ["SUBMITIT_LOCAL_JOB_ID"] = f"test{os.getppid()}"
    torch.set_num_threads(1)
    with distributed.session("cpu"):
        assert (distributed.rank(), distributed.world_size()) == (rank, world)
        own = torch.full((rank + 1, 2), float(rank))
        assert distributed.all_reduce_mean(torch.tensor(float(rank))) == 0.5
        count = torch.tensor([rank + 1, 2**60])  # whole numbers stay exact
        assert distributed.all_reduce_sum(count).tolist() == [3, 2**61] and count[0] == rank + 1
        assert distributed.all_reduce_max(torch.tensor([1 - rank, rank])).tolist() == [1, 1]
        assert distributed.all_gather_variable(own).tolist() == [[0, 0], [1, 1], [1, 1]]
        unlike = torch.nn.BatchNorm2d(2)
        unlike.weight.data.fill_(rank)
        unlike.running_mean.fill_(rank)
        parallel.broadcast_state(unlike)
        assert unlike.weight.tolist() == unlike.running_mean.tolist() == [0, 0]
        # A parameter that one rank alone used, and one that nobody did.
        loose = torch.nn.Linear(1, 2)
        loose.weight.grad = torch.full((2, 1), 3.0) if rank else None
        parallel.Gradients(loose).finish()
        assert loose.weight.grad.tolist() == [[1.5], [1.5]] and loose.bias.grad is None
        norm = torch.nn.BatchNorm2d(2)
        norm.running_mean.fill_(rank)
        norm.num_batches_tracked.fill_(3)
        distributed.average_buffers(norm)
        assert norm.running_mean.tolist() == [0.5, 0.5] and norm.num_batches_tracked == 3
        wide = torch.nn.BatchNorm2d(1).double()
        wide.running_mean.fill_(1 / 3)
        distributed.average_buffers(wide)
        assert wide.running_mean.tolist() == [1 / 3]
        assert distributed.gather_objects(rank) == [0, 1]
        assert distributed.broadcast_object(rank) == 0
    assert not torch.distributed.is_initialized()


# A job's handler for signals, and a peer that never comes.
WAITING = """
import signal, sys
from utils import distributed

def leave(number, frame):
    raise SystemExit(128 + number)

signal.signal(signal.SIGUSR2, leave)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
print("waits", flush=True)
distributed.setup("cpu")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR2], ids=lambda n: n.name)
def test_a_process_that_waits_for_the_others_can_be_ended(number: signal.Signals) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = [sys.executable, "-c", WAITING]
    with subprocess.Popen(words, env=os.environ | place, cwd=ROOT, stdout=subprocess.PIPE) as alone:
        try:
            alone.stdout.readline()
            until = time.monotonic() + 60
            while not listens(port) and time.monotonic() < until:
                time.sleep(0.05)
            alone.send_signal(number)
            assert alone.wait(60) == -number
        finally:
            alone.kill()


def listens(port: int) -> bool:
    with socket.socket() as visitor:
        return not visitor.connect_ex(("127.0.0.1", port))
