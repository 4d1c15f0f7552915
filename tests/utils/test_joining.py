"""A process finds its place, whoever started it, and its device."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from utils import joining
from utils.errors import UserError
from utils.joining import Process, find_process, first_host

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


def test_no_gpu_is_said():
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU"):
            joining.setup("cuda")
        assert joining.setup("auto") == torch.device("cpu")


# A job's handler for signals, and a peer that never comes.
WAITING = """
import signal, sys
from utils import joining
from utils.joining import session

def leave(number, frame):
    raise SystemExit(128 + number)

signal.signal(signal.SIGUSR2, leave)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
print("waits", flush=True)
joining.setup("cpu")
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
