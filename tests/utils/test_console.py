"""A command without standard streams, or whose log file is on a full disk, goes on."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.console import output_taken

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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
@pytest.mark.parametrize("size", [3, 10_000])  # within the buffer, and beyond it
def test_what_a_command_is_asked_to_print_ends_it_in_one_line(size) -> None:
    code = f"from utils.console import output_taken\nwith output_taken(): print('x' * {size})"
    done = _run(code, ">/dev/full")
    assert done.returncode == 1
    assert done.stderr == "error: standard output takes no more: No space left on device\n"
    assert _run(code, ">&2").returncode == 0


@pytest.mark.parametrize("size", [3, 100_000])
def test_to_a_reader_that_has_gone_nothing_is_said(size) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = f"from utils.console import output_taken\nwith output_taken(): print('x' * {size})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_an_error_with_a_file_is_another() -> None:
    with pytest.raises(OSError, match=r"results\.json"), output_taken():
        raise OSError(errno.ENOSPC, "No space left on device", "results.json")


def test_closed_streams_lead_nowhere() -> None:
    code = (
        "import os, sys; from utils.console import open_closed_streams; open_closed_streams()\n"
        "assert [s.fileno() for s in (sys.stdin, sys.stdout, sys.stderr)] == [0, 1, 2]\n"
        "print('x'); print('x', file=sys.stderr); assert not sys.stdout.isatty()"
    )
    assert _run(code, "<&- >&- 2>&-").returncode == 0
