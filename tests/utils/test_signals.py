"""Signals that end a run in order, and a terminal that goes away."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.signals import STOP_SIGNALS, StopSignal

ROOT = Path(__file__).resolve().parents[2]
# A run that tells of each step, and saves after a last message.
PROGRAM = """
import fcntl, sys, termios, time
from pathlib import Path
from utils.signals import StopSignal

fcntl.ioctl(0, termios.TIOCSCTTY, 0)
with StopSignal() as stop:
    Path(sys.argv[1], "begun").touch()
    while stop.received is None:
        time.sleep(0.05)
    print("stopped at step 3", flush=True)
    print("a note", file=sys.stderr, flush=True)
    Path(sys.argv[1], "saved").write_text(stop.received.name)
"""


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_it_is_noted_and_nothing_ends(number: signal.Signals) -> None:
    with StopSignal() as stop:
        os.kill(os.getpid(), number)
    assert stop.received is number


def test_whatever_may_warn_a_job_is_a_stop_signal() -> None:
    """`sbatch --signal` names USR1 as often as USR2."""
    assert {number.name for number in STOP_SIGNALS} == {
        *("SIGHUP", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGTERM")
    }


def test_an_interrupt_is_not_forgotten_and_a_second_one_interrupts() -> None:
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # as a launcher passes it on
        assert stop.received is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, earlier)


def test_a_run_whose_terminal_is_closed_saves(tmp_path: Path) -> None:
    """Its messages have no reader then, and writing them fails."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=ROOT,
        start_new_session=True,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    try:
        os.close(theirs)
        end = time.monotonic() + 60
        while not (tmp_path / "begun").exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        os.close(ours)  # the window is closed
        assert process.wait(timeout=30) == 0
        assert (tmp_path / "saved").read_text() == "SIGHUP"
    finally:
        process.kill()
        process.wait()
