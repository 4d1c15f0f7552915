"""Only the very process that was started is ever stopped."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from slurm.processes import descendants, free_ports, lives, started, stop

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(SLEEP)
    yield process
    process.kill()
    process.wait()


def test_a_process_is_known_by_pid_time_and_command(sleeper) -> None:
    daemon = {"pid": sleeper.pid, "started": started(sleeper.pid), "command": SLEEP}
    assert lives(daemon)
    assert not lives({**daemon, "started": daemon["started"] - 1})
    assert not lives({**daemon, "command": ["sleep", "600"]})


def test_another_process_of_the_same_number_is_left_alone(sleeper) -> None:
    stop(sleeper.pid, started(sleeper.pid) - 1)
    assert sleeper.poll() is None
    stop(sleeper.pid, started(sleeper.pid))
    assert sleeper.wait(timeout=10) == -15
    assert started(sleeper.pid) == 0


def test_descendants() -> None:
    child = f"import subprocess; subprocess.run({SLEEP!r})"
    process = subprocess.Popen([sys.executable, "-c", child])
    try:
        while not (found := descendants({process.pid})):
            assert process.poll() is None
        assert process.pid not in found and len(found) == 1
    finally:
        for pid in (*descendants({process.pid}), process.pid):
            stop(pid, started(pid))
        process.wait()


def test_ports_are_consecutive() -> None:
    first, *others = free_ports(5)
    assert others == list(range(first + 1, first + 5))
