"""How the figures of probes are shown, and DINOv2's lines are written."""

import json
from pathlib import Path

from evaluation.results import append_lines, print_figures


def test_lines_are_added_to_those_of_before(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.json"
    for value in (1.5, 2.5):
        append_lines(path, {"a": value, "b": None})
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert found == [{"a": 1.5}, {"b": None}, {"a": 2.5}, {"b": None}]


def test_top_1_and_top_5_stand_side_by_side(capsys) -> None:
    figures = {"knn_top1": 12.25, "knn_top5": 67.0, "one_top1": 8.0, "lone_top5": 9.0, "mean": 7}
    print_figures("title", "knn", figures, protocol="as told")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "title" and lines[-1] == "protocol: as told"
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if "│" in line]
    assert rows == [
        ["knn", "12.25", "67.00", ""],
        ["one", "8.00", "-", ""],
        ["lone_top5", "", "", "9.00"],
        ["mean", "", "", "7"],
    ]
    assert any("figure" in line for line in lines)


def test_a_figure_that_is_no_share_is_no_top_1(capsys) -> None:
    figures = {"logreg_top1": 8.0, "logreg_top5": 9.0, "logreg_C": 1e-6}
    print_figures("title", "logreg", figures, protocol="as told")
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if "│" in line]
    assert rows == [["logreg", "8.00", "9.00", ""], ["logreg_C", "", "", "1e-06"]]
