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


def test_a_step_of_fewer_tasks_or_nodes_than_its_job_meets_by_itself():
    """What the step says of itself comes before what its job says; each step has its own port."""
    job = {**SLURM, "SLURM_JOB_NODELIST": "gpu[01-03]", "SLURM_STEP_NUM_TASKS": "9"}
    assert find_process(job)[:4] == (3, 1, 9, "gpu02")
    assert find_process(job).port != find_process({**job, "SLURM_STEP_ID": "1"}).port
    del job["SLURM_STEP_NODELIST"], job["SLURM_STEP_NUM_TASKS"]
    assert find_process(job)[:4] == (3, 1, 4, "gpu01")
    assert find_process({**job, "MASTER_ADDR": "x", "MASTER_PORT": "7"})[3:] == ("x", 7)


def test_jobs_of_one_machine_meet_at_ports_that_linux_gives_to_nobody():
    """32768 is the first that it hands out by itself; each job has a port of its own."""
    places = [{**SUBMITIT, "SUBMITIT_LOCAL_JOB_ID": str(number)} for number in range(30)]
    ports = [find_process(place).port for place in places]
    assert min(ports) >= 20000 and max(ports) < 32768
    assert len(set(ports)) == len(ports)


@pytest.mark.parametrize("rank", ["-1", "8", "9"])
def test_a_rank_beyond_the_processes_is_refused(rank):
    with pytest.raises(UserError, match=f"^the environment says rank {rank} of 8 processes"):
        find_process({**TORCHRUN, "RANK": rank})
    with pytest.raises(UserError, match=f"^the environment says rank {rank} of 4 processes"):
        find_process({**SLURM, "SLURM_PROCID": rank, "SLURM_NTASKS": "4"})


@pytest.mark.parametrize("port", ["-1", "65536", "295000"])
def test_a_port_that_is_none_is_refused(port):
    with pytest.raises(UserError, match=f"^MASTER_PORT is {port}; ports are numbers below 65536$"):
        find_process({**TORCHRUN, "MASTER_PORT": port})


def test_without_a_local_rank_a_process_of_torchrun_takes_its_rank():
    place = {key: value for key, value in TORCHRUN.items() if key != "LOCAL_RANK"}
    assert find_process(place)[:3] == (5, 5, 8)


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
        ("r[1-2]n[03,4-5],x", "r1n03"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


def test_a_list_that_names_no_node_is_refused_where_it_is_needed():
    place = {**SLURM, "SLURM_STEP_NODELIST": "[1-2"}
    with pytest.raises(UserError, match=r"no host in the Slurm node list '\[1-2'"):
        find_process(place)
    assert find_process({**place, "MASTER_ADDR": "x"}).address == "x"


def test_no_gpu_is_said():
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU"):
            joining.setup("cuda")
        assert joining.setup("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("count", "seen"), [(1, "cuda:0 alone"), (2, "cuda:0 to cuda:1"), (10, "cuda:0 to cuda:9")]
)
def test_a_gpu_that_is_not_there_is_told_beside_those_that_are(count, seen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for index in (count, 999):
        with pytest.raises(UserError, match=f"^device=cuda:{index}, but torch sees {seen} here$"):
            joining.setup(f"cuda:{index}")


@pytest.mark.parametrize(("count", "index"), [(1, 0), (4, 2), (3, 2)])
def test_a_process_takes_the_gpu_of_its_place_or_the_only_one(count, index, monkeypatch):
    """A launcher may bind one GPU to each process, which then sees no other."""
    chosen: list[torch.device] = []
    place = {"RANK": "6", "LOCAL_RANK": "2", "WORLD_SIZE": "8"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for key, value in place.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(joining, "joined", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for device in ("auto", "cuda"):
        assert joining.setup(device) == torch.device("cuda", index)
    assert joining.setup("cuda:0") == torch.device("cuda:0")
    assert chosen == [torch.device("cuda", number) for number in (index, index, 0)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="process 2 of this machine has no GPU: 2 are visible"):
        joining.setup("auto")


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:0,1", "cuda1", "cpu:0", ""])
def test_a_device_that_is_none_is_refused(device):
    with pytest.raises(UserError, match=f"^device={device} is unknown; choose auto, cpu, cuda or"):
        joining.setup(device)


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
