"""The lines of `launches.jsonl`: read in the order in which things happened."""

import json
from pathlib import Path

import pytest

from slurm import record
from utils.run_files import LAUNCHES


def put(path: Path, *lines: tuple[str, float]) -> None:
    path.write_text("".join(json.dumps({"event": e, "time": t}) + "\n" for e, t in lines))


def test_a_file_keeps_its_order_whatever_the_clocks_of_its_writers_say(tmp_path):
    # A batch script whose node is behind the node of rank 0.
    put(tmp_path / LAUNCHES, ("began", 10.0), ("stopped", 12.4), ("final", 12.0))
    put(tmp_path / "launches.rank1.jsonl", ("lost_peer", 11.0), ("failed", 13.0))
    read = [line["event"] for line in record.read(tmp_path)]
    assert read == ["began", "lost_peer", "stopped", "final", "failed"]


def test_torn_lines_and_lines_of_something_else_are_left_out(tmp_path):
    put(tmp_path / LAUNCHES, ("began", 1.0))
    with (tmp_path / LAUNCHES).open("a") as file:
        file.write('7\n{"no": "event"}\n{"event": "sto')
    assert [line["event"] for line in record.read(tmp_path)] == ["began"]


@pytest.mark.parametrize(
    "line", [{}, {"job": None, "attempt": "x", "time": "noon"}, {"time": 1e999}]
)
def test_values_of_another_kind_count_as_none(tmp_path, line):
    (tmp_path / LAUNCHES).write_text(json.dumps({"event": "failed", **line}))
    expected = {"event": "failed", "job": "", "attempt": 0, "time": 0.0}
    assert record.read(tmp_path) == [expected]


WAYS_OUT = [
    (None, "ended", {}),
    (SystemExit(0), "ended", {}),
    (SystemExit(128 + 15), "stopped", {"signal": "SIGTERM"}),
    (KeyboardInterrupt(), "stopped", {"signal": "SIGINT"}),
    (SystemExit(3), "failed", {"error": "it left with code 3"}),
    (SystemExit("no room on the moon"), "failed", {"error": "it left with code 1"}),
    (record.Ended(4, "rank 2 was killed"), "failed", {"error": "rank 2 was killed"}),
    (RuntimeError("Connection reset by peer"), "lost_peer", {}),
]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("error", "event", "facts"), WAYS_OUT)
def test_every_way_out_is_noted(tmp_path, monkeypatch, rank, error, event, facts):
    """By rank 0; the others note failures alone, and a stop of theirs ends nobody else's work."""
    monkeypatch.setenv("RANK", str(rank))
    left = None
    try:
        with record.attempt(tmp_path, job="7"):
            if error:
                raise error
    except BaseException as raised:
        left = raised
    lines = record.read(tmp_path)
    told = rank == 0 or event in ("failed", "lost_peer")
    assert [line["event"] for line in lines] == ["began"] * (rank == 0) + [event] * told
    assert not told or lines[-1].items() >= {"job": "7", **facts}.items()
    if rank and event == "stopped" and isinstance(error, SystemExit):
        assert left.code == 0
    else:
        assert left is error
