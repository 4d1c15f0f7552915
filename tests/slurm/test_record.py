"""The lines of `launches.jsonl`: read in the order in which things happened."""

import json
from pathlib import Path

from slurm import record


def put(path: Path, *lines: tuple[str, float]) -> None:
    path.write_text("".join(json.dumps({"event": e, "time": t}) + "\n" for e, t in lines))


def test_a_file_keeps_its_order_whatever_the_clocks_of_its_writers_say(tmp_path):
    # A batch script whose node is behind the node of rank 0.
    put(tmp_path / record.NAME, ("began", 10.0), ("stopped", 12.4), ("final", 12.0))
    put(tmp_path / "launches.rank1.jsonl", ("lost_peer", 11.0), ("failed", 13.0))
    read = [line["event"] for line in record.read(tmp_path)]
    assert read == ["began", "lost_peer", "stopped", "final", "failed"]


def test_torn_lines_and_lines_of_something_else_are_left_out(tmp_path):
    put(tmp_path / record.NAME, ("began", 1.0))
    with (tmp_path / record.NAME).open("a") as file:
        file.write('7\n{"no": "event"}\n{"event": "sto')
    assert [line["event"] for line in record.read(tmp_path)] == ["began"]
