"""What a folder holds is found; what cannot be read is left out and noted."""

import errno
import json
import math
from pathlib import Path

import pytest

from evaluation.report.collect import Results, collect
from tests.evaluation.report.folders import draw, make_evaluation, make_quickstart, make_run
from utils.errors import UserError


def test_a_training(tmp_path: Path) -> None:
    """Config, code, metrics, checkpoints; figures that the summary alone has, with settings."""
    found = collect(make_run(tmp_path / "run"))
    assert (found.name, found.code, len(found.metrics)) == ("my_run", "0123abc torch 2.11", 60)
    assert found.checkpoints == [("checkpoints/60", 2000)]
    assert found.files == [("exported/model.safetensors", 3000)]
    (result,) = found.results
    assert (result.probe, result.figures) == ("accuracy", {"acc1": 97.25})
    assert result.protocol["symmetries"] is True
    assert not found.pictures, "curves.png shows what the page draws itself"
    assert found.began is not None and not found.notes and not found.runs


def test_an_evaluation(tmp_path: Path) -> None:
    found = collect(make_evaluation(tmp_path / "evaluation"))
    assert [path.name for path in found.pictures] == ["neighbours.png"]
    assert found.results[0].protocol["ks"] == [10] and found.results[0].source == "results.json"


def test_an_evaluation_is_told_once(tmp_path: Path) -> None:
    """A probe's own folder has all figures, the file above it the net; others' stay apart."""
    folder = make_evaluation(tmp_path / "evaluation")
    written = json.loads((folder / "results.json").read_text())
    short = written["knn"]
    short["protocol"]["weights"] = "a.pth"
    (folder / "results.json").write_text(json.dumps(written))

    def beside(protocol: dict, figures: dict) -> list[Results]:
        entry = {"neighbours": {"protocol": protocol, "figures": figures}}
        (folder / "knn" / "results.json").write_text(json.dumps(entry))
        return collect(folder).results

    more = {f"('full', {k}) Top 1": 86.9 for k in (1, 5, 10, 20)}
    protocol = short["protocol"] | {"step": 3}
    assert beside({"ks": [10], "step": 3}, more) == [
        Results("knn", "knn/results.json", more, protocol)
    ]
    (same,) = beside({"ks": [10]}, dict(list(more.items())[:3]))
    assert same.figures == short["figures"]
    assert [result.probe for result in beside({"ks": [20]}, more)] == ["neighbours", "knn"]


def test_a_closed_folder_is_noted_and_a_closed_run_is_one_line(tmp_path: Path, monkeypatch) -> None:
    run = make_run(tmp_path / "run")
    original = Path.iterdir

    def listed(path: Path):
        if path.name in closed:  # nothing is closed to root
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(Path, "iterdir", listed)
    closed = ("exported", "checkpoints")
    found = collect(run)
    assert sorted(found.notes) == ["checkpoints: Permission denied", "exported: Permission denied"]
    closed = ("run",)
    with pytest.raises(UserError, match=f"^cannot read {run}: Permission denied$"):
        collect(run)


def test_runs_below_a_folder_are_told_apart(tmp_path: Path) -> None:
    found = collect(make_quickstart(tmp_path / "quickstart"))
    assert [run.folder.name for run in found.runs] == ["octic", "plain"]
    assert [path.name for path in found.pictures] == ["pca_octic.png"]
    assert [result.probe for result in found.results] == ["comparison"]


def test_results_of_a_probe_below_a_run_come_with_it(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    make_evaluation(folder / "judged")
    found = collect(folder)
    assert {result.source for result in found.results} == {"judged/results.json", "summary.json"}


def test_broken_parts_are_noted_and_the_rest_is_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "loss": null}\n[1]\n{"step": null}\n{"loss": 1}\n')
        file.write('{"step": Infinity}\n{"step": 6')
    (folder / "summary.json").write_text("{")
    (folder / "config.yaml").write_text("a: [")
    (folder / "results.json").write_text(json.dumps({"knn": 3}))
    found = collect(folder)
    assert len(found.metrics) == 61 and math.isnan(found.metrics[-1]["loss"])
    assert found.notes[-2] == "metrics.jsonl: 5 of 66 lines cannot be read"
    assert found.notes[-1] == "results.json: knn has no figures"
    assert any(note.startswith("summary.json cannot be read") for note in found.notes)
    assert any(note.startswith("config.yaml cannot be read") for note in found.notes)
    assert found.name == "run"


def test_bytes_that_are_no_text_are_no_traceback(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "config.yaml").write_bytes(b"\xff\x00: \xfe")
    assert collect(folder).notes[0].startswith("config.yaml")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.write_text("x"), "is a file"),
        (lambda folder: folder.mkdir(), "holds nothing to report: no config.yaml"),
    ],
)
def test_a_folder_without_anything_is_one_line(tmp_path: Path, make, said: str) -> None:
    folder = tmp_path / "folder"
    make(folder)
    with pytest.raises(UserError, match=said) as caught:
        collect(folder)
    assert "\n" not in str(caught.value)


def test_links_are_not_followed(tmp_path: Path) -> None:
    """A link to a parent would never end."""
    folder = make_evaluation(tmp_path / "evaluation")
    (folder / "loop").symlink_to(folder)
    draw(folder / ".hidden.png", (4, 4))
    assert len(collect(folder).pictures) == 1
