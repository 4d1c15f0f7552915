"""A line of progress says whose items it counts."""

import pytest

from evaluation.progress import track_share
from utils import distributed


@pytest.mark.parametrize(("world", "label"), [(1, "val"), (2, "val, process 1 of 2")])
def test_the_share_of_a_process_is_told_from_the_whole(world, label, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    assert list(track_share([[0, 1], [2]], total=3, label="val", size=len)) == [[0, 1], [2]]
    line = capsys.readouterr().out
    assert line.startswith(f"{label}: 3 of 3, ") and line.endswith(", done\n")


def test_only_the_first_process_tells_of_its_share(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    assert list(track_share([[0]], total=1, label="val", size=len)) == [[0]]
    assert capsys.readouterr().out == ""
