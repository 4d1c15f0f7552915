"""What stands in the environment by mistake is one line, before anything waits for peers."""

import socket

import pytest
import torch.distributed as dist

from utils import joining
from utils.environment import whole_number
from utils.errors import UserError
from utils.joining import Process, find_process

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_a_number_its_default_or_a_mistake(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert whole_number("RANK") == 3
    assert whole_number("RANK", 4, {}) == 4
    with pytest.raises(UserError, match="RANK is None; set it"):
        whole_number("RANK", env={})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RANK", "", "RANK is ''; set it to a whole number"),
        ("WORLD_SIZE", "two", "WORLD_SIZE is 'two'"),
        ("LOCAL_RANK", "x", "LOCAL_RANK is 'x'"),
        ("MASTER_PORT", "abc", "MASTER_PORT is 'abc'"),
        ("MASTER_PORT", "99999", "MASTER_PORT is 99999; ports are numbers below 65536"),
        ("RANK", "5", "rank 5 of 2 processes"),
        ("WORLD_SIZE", "-1", "rank 0 of -1 processes"),
    ],
)
def test_what_is_no_place_among_processes(name, value, said) -> None:
    with pytest.raises(UserError, match=said):
        find_process({**TORCHRUN, name: value})


def test_a_step_of_slurm_with_no_number() -> None:
    with pytest.raises(UserError, match="SLURM_PROCID is 'x'"):
        find_process({"SLURM_STEP_ID": "0", "SLURM_PROCID": "x"})


def test_processes_cannot_meet_at_a_machine_nobody_knows(monkeypatch) -> None:
    def unknown(*_):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(joining, "NAMED_WITHIN_S", -1)
    said = "there is no machine nohost, .* Name or service not known"
    with pytest.raises(UserError, match=said), joining._meeting(Process(address="nohost")):
        pass


def test_a_name_that_becomes_known_is_waited_for(monkeypatch) -> None:
    answers = [socket.gaierror(socket.EAI_NONAME, "Name or service not known"), None]

    def known_later(*_):
        if answer := answers.pop(0):
            raise answer

    monkeypatch.setattr(socket, "getaddrinfo", known_later)
    monkeypatch.setattr(joining.time, "sleep", lambda seconds: None)
    with joining._meeting(Process(address="later")):
        assert answers == []


def test_nor_at_a_port_that_another_program_has(monkeypatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("0.0.0.0", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        said = f"port {port} of this machine is in use by another program"
        with pytest.raises(UserError, match=said):
            joining.setup("cpu")
    assert not dist.is_initialized()
