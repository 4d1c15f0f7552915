"""What a signal to the command comes to with launcher=local: the processes save, and leave."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slurm import record
from slurm.local import run_apart
from slurm.runs import describe

ROOT = Path(__file__).resolve().parents[2]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a function of tests/slurm/work.py in two processes, in a Python of its own."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    started: list[subprocess.Popen[str]] = []

    def begin(function: str, *words: str) -> subprocess.Popen[str]:
        config = {
            "name": "x",
            "output_dir": str(tmp_path),
            "probes": {},
            "launcher": {"kind": "local", "nodes": 1, "gpus_per_node": 2, "timeout_min": 5},
        }
        program = (
            "from slurm.launch import launch\n"
            "if __name__ == '__main__':\n"
            f"    launch('tests.slurm.work.{function}', {json.dumps(config)})\n"
        ).replace("null", "None")
        (tmp_path / "program.py").write_text(program)
        process = subprocess.Popen(
            [*words, sys.executable, str(tmp_path / "program.py")],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        end = time.monotonic() + 120
        while not all((tmp_path / f"begun{rank}").exists() for rank in (0, 1)):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        return process

    yield begin
    for process in started:
        process.kill()  # its processes end with it
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_reaches_the_processes_and_is_noted(tmp_path: Path, start: Start, number) -> None:
    process = start("until_told")
    process.send_signal(number)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert told.splitlines()[-1] == f"stopped by {number.name}" and "Traceback" not in told
    assert [(tmp_path / f"saved{rank}").read_text() for rank in (0, 1)] == [number.name] * 2
    lines = record.read(tmp_path)
    assert [line["event"] for line in lines] == ["began", "stopped"]
    assert lines[-1]["signal"] == number.name
    assert describe(tmp_path).why == f"told to stop by {number.name}; the same command goes on"


def test_an_interrupt_of_the_command_alone_reaches_the_processes(
    tmp_path: Path, start: Start
) -> None:
    process = start("until_told")
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in told
    assert all((tmp_path / f"saved{rank}").exists() for rank in (0, 1))
    assert [line.get("signal") for line in record.read(tmp_path)] == [None, "SIGINT"]


def test_what_heeds_no_signal_yet_is_stopped_all_the_same(tmp_path: Path, start: Start) -> None:
    process = start("sleep_on")
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and told.splitlines()[-1] == "stopped by SIGTERM"
    assert [line["event"] for line in record.read(tmp_path)] == ["began", "stopped"]


def test_a_failure_on_the_way_out_is_told(tmp_path: Path, start: Start) -> None:
    process = start("fail_when_told")
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "error: no space left on the moon\n" in told
    assert describe(tmp_path).state == "FAILED"


def test_under_nohup_a_closed_terminal_stops_nothing(tmp_path: Path, start: Start) -> None:
    process = start("until_told", "nohup")
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None and not list(tmp_path.glob("saved*"))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


class _Told:
    """An argument that ends the command, by a signal, while the other process is being started."""

    def __reduce__(self) -> tuple:
        os.kill(os.getpid(), signal.SIGTERM)
        return float, (60.0,)


def test_a_signal_while_a_process_starts_reaches_it() -> None:
    begun = time.monotonic()
    with pytest.raises(SystemExit) as left:
        run_apart(time.sleep, _Told())
    assert left.value.code == 128 + signal.SIGTERM and time.monotonic() - begun < 30
