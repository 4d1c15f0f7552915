"""What probes leave in a folder: each its figures, none another's."""

import json
from pathlib import Path

import pytest

from utils.results_file import write_results
from utils.run_files import RESULTS


def net(name: str) -> dict:
    return {"backbone": {"_target_": f"vit.models.{name}"}, "weights": "w.pth"}


def test_probes_keep_their_figures_beside_each_other(tmp_path: Path, capsys) -> None:
    """A probe's own are replaced, which is told where they are of another network."""
    write_results(tmp_path / "new", "knn", protocol=net("small"), figures={"top1": 1.5})
    path = write_results(tmp_path / "new", "linear", protocol=net("large"), figures={"top1": 2})
    write_results(tmp_path / "new", "knn", protocol=net("small"), figures={"top1": 3})
    assert not capsys.readouterr().out
    write_results(tmp_path / "new", "knn", protocol=net("base"), figures={"top1": 4})
    assert "replaces the knn results of small, weights: w.pth" in capsys.readouterr().out
    assert json.loads(path.read_text()) == {
        "knn": {"protocol": net("base"), "figures": {"top1": 4}},
        "linear": {"protocol": net("large"), "figures": {"top1": 2}},
    }


def test_figures_of_other_settings_are_not_replaced_in_silence(tmp_path: Path, capsys) -> None:
    """A later step, other processes, or a key that one of two versions lacks are none."""
    protocol = {"symmetries": ("e", "r"), "step": 0, "world_size": 1, "formerly": 1}
    write_results(tmp_path, "accuracy", protocol=net("a") | protocol, figures={})
    same = net("a") | {"symmetries": ["e", "r"], "step": 2, "world_size": 2, "lately": 1}
    write_results(tmp_path, "accuracy", protocol=same, figures={})
    assert not capsys.readouterr().out
    other = same | {"symmetries": ["e"]}
    path = write_results(tmp_path, "accuracy", protocol=other, figures={})
    said = f"{path}: replaces the accuracy results of symmetries = ['e', 'r']\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("entry", [3, None, {}, {"figures": {}}, {"protocol": "words"}])
def test_figures_are_written_whatever_stood_in_their_place(tmp_path: Path, entry: object) -> None:
    path = tmp_path / RESULTS
    path.write_text(json.dumps({"knn": entry, "mine": entry}))
    write_results(tmp_path, "knn", protocol={"backbone": "a"}, figures={"top1": 1.0})
    written = json.loads(path.read_text())
    assert written["knn"]["figures"] == {"top1": 1.0} and written["mine"] == entry


@pytest.mark.parametrize("text", ['{"knn": {', "[1, 2]", "3"])
def test_a_damaged_file_is_set_aside(tmp_path: Path, capsys, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    path = write_results(tmp_path, "knn", protocol={}, figures={"top1": 1})
    assert list(json.loads(path.read_text())) == ["knn"]
    assert (tmp_path / "results.damaged").read_text() == text
    assert "set aside as results.damaged" in capsys.readouterr().out
    path.write_text("again")
    write_results(tmp_path, "knn", protocol={}, figures={"top1": 1})
    assert (tmp_path / "results.damaged").read_text() == text
    assert (tmp_path / "results.damaged1").read_text() == "again"


def test_what_cannot_be_written_harms_nothing(tmp_path: Path) -> None:
    path = write_results(tmp_path, "knn", protocol={}, figures={"top1": 1})
    before = path.read_text()
    with pytest.raises(TypeError):
        write_results(tmp_path, "knn", protocol={}, figures={"top1": {1}})
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]
