"""A command without standard streams, or whose log file is on a full disk, goes on."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _run(code: str, redirection: str) -> subprocess.CompletedProcess[str]:
    words = ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, code]
    return subprocess.run(words, cwd=ROOT, text=True, capture_output=True, check=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_lines_that_a_full_disk_does_not_take_end_nothing() -> None:
    code = "from utils.console import Lines; Lines().print('x'); Lines().print('y'); print('z')"
    done = _run(code, ">/dev/full")
    assert done.returncode == 0
    assert done.stderr == "standard output takes no more: No space left on device\n"
    assert _run(code, ">/dev/full 2>&1").returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_nor_do_those_of_an_evaluation() -> None:
    code = (
        "from evaluation.progress import say; from evaluation.results import print_table\n"
        "say('x'); print_table('title', ['a'], [[1]], protocol='p'); print('z')"
    )
    done = _run(code, ">/dev/full")
    assert done.returncode == 0
    assert done.stderr == "standard output takes no more: No space left on device\n"


def test_closed_streams_lead_nowhere() -> None:
    code = (
        "import os, sys; from utils.console import open_closed_streams; open_closed_streams()\n"
        "assert [s.fileno() for s in (sys.stdin, sys.stdout, sys.stderr)] == [0, 1, 2]\n"
        "print('x'); print('x', file=sys.stderr); assert not sys.stdout.isatty()"
    )
    assert _run(code, "<&- >&- 2>&-").returncode == 0
