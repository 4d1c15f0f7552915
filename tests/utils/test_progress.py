"""Lines of progress have rate and time left, and end no work when they are lost."""

import subprocess
import sys
from pathlib import Path

import pytest

from utils import progress
from utils.progress import RateLines

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, which a test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_few_seconds_and_where_asked_at_the_end(clock, capsys) -> None:
    lines, quick = RateLines("train", 4000, ends=True), RateLines("val", 1)
    quick.add()
    for seconds, count in ((5.0, 500), (10.0, 1500), (19.0, 100), (20.0, 1900)):
        clock[0] = 100 + seconds
        lines.add(count)
    assert capsys.readouterr().out.splitlines() == [
        "train: 2,000 of 4,000 images, 200 images/s, 10 s left",
        "train: 4,000 of 4,000 images, 200 images/s, done",
    ]


def test_what_was_done_before_is_not_in_the_rate(clock, capsys) -> None:
    lines = RateLines("a.zip", 900_000_000, "MB", scale=1e6, done=600_000_000)
    clock[0] += 20
    lines.add(100_000_000)
    assert capsys.readouterr().out == "a.zip: 700 of 900 MB, 5.0 MB/s, 40 s left\n"


def test_an_unknown_total_and_no_unit(clock, capsys) -> None:
    clocked = RateLines("pages", None, ""), RateLines("silent", 1, shown=False)
    clock[0] += 10
    for lines in clocked:
        lines.add(0)  # nothing done has no rate
        lines.add(1)
    assert capsys.readouterr().out == "pages: 1, 0.1/s\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_lines_that_a_full_disk_does_not_take_end_nothing() -> None:
    """Neither of a listing of shards nor of a download."""
    code = "from utils.progress import RateLines; RateLines('x', 1, ends=True).add(); print('y')"
    words = ["sh", "-c", 'exec "$0" -c "$1" >/dev/full', sys.executable, code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == "standard output takes no more: No space left on device\n"
