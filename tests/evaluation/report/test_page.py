"""The page is one file that asks for nothing, tells what was found, and escapes what it read."""

import errno
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.report.charts import _tick, chart, thin, ticks
from evaluation.report.images import embed, shrink
from evaluation.report.page import write_report
from tests.evaluation.report.folders import draw, make_evaluation, make_quickstart, make_run
from utils.errors import UserError
from utils.symmetry import SYMMETRIES

ROOT = Path(__file__).resolve().parents[3]
VOID = {"meta", "img", "br", "line"}


class Reader(HTMLParser):
    """Tags in balance, and all attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def asks_for_nothing(page: str) -> None:
    reader = Reader(page)
    assert not {"script", "link", "iframe", "object", "embed"} & set(reader.tags)
    for name, value in reader.attributes:
        if name in ("src", "href", "srcset", "data", "action"):
            assert value.startswith("data:image/"), f"{name}={value[:60]}"
        assert not name.startswith("on"), name
    assert "url(" not in page and "@import" not in page


def written(folder: Path) -> str:
    page = write_report(folder).read_text()
    asks_for_nothing(page)
    return page


def test_a_training_is_told(tmp_path: Path) -> None:
    page = written(make_run(tmp_path / "run"))
    text = Reader(page).text
    for words in (
        *("my_run", "hybrid_deit_small_patch16 (depth 4)", "recipe DeiT", "data digits"),
        *("code 0123abc", "60 of 100, unfinished", "1:02:05", "453,898", "97.25", "symmetries"),
        *("checkpoints/60", "2.0 kB", "exported/model.safetensors", "AccuracyProbe"),
    ):
        assert words in text, words
    assert page.count("<svg") == 2 and "<title>loss, step 60: 0.016667</title>" in page
    assert written(tmp_path / "run") == page, "a report of a reported folder is the same"


def test_an_evaluation_is_told(tmp_path: Path) -> None:
    """Kinds of figures become columns; the protocol stands beside them."""
    page = written(make_evaluation(tmp_path / "evaluation"))
    assert '<tr><td>knn10</td><td class="number">86.91</td><td class="number">99.10</td>' in page
    assert "<dt>vote</dt><dd>softmax of similarity / 0.07</dd>" in page
    assert page.count("<img") == 1 and "nearest training images" in page and "<svg" not in page


def test_a_figure_of_another_kind_is_under_no_heading(tmp_path: Path) -> None:
    folder = make_evaluation(tmp_path / "evaluation")
    figures = {"top1": 80.0, "top5": 90.5, "images_per_second": 30.25}
    (folder / "results.json").write_text(json.dumps({"net": {"protocol": {}, "figures": figures}}))
    page = written(folder)
    assert (
        '<tr><th></th><th class="number">top1</th><th class="number">top5</th>'
        '<th class="number"></th></tr>'
    ) in page
    rows = [
        re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(<td>.*?)</tr>", page)
    ]
    assert rows[:2] == [["net", "80", "90.50", ""], ["images_per_second", "", "", "30.25"]]


def test_a_long_table_is_folded_and_a_wide_picture_is_as_wide_as_the_page(tmp_path: Path) -> None:
    folder = make_evaluation(tmp_path / "evaluation")
    heads = {f"head {index}": {"val top-1": index} for index in range(90)}
    entry = {"protocol": {}, "figures": {"top1": 80.0, "heads": heads}}
    (folder / "results.json").write_text(json.dumps({"linear": entry}))
    draw(folder / "errors.png", (1400, 300))
    page = written(folder)
    assert page.count("<summary>heads, 90 rows</summary>") == 1 and page.count("val top-1") == 1
    assert page.count('<figure class="wide">') == 1 and page.count("<figure>") == 1


def test_beside_a_wide_table_there_is_no_room_for_the_protocol(tmp_path: Path) -> None:
    folder = make_evaluation(tmp_path / "evaluation")
    for symmetries, classes in ((SYMMETRIES, "result long"), (["e", "m"], "result")):
        layers = {f"blocks.{index}": dict.fromkeys(symmetries, 1e-7) for index in range(4)}
        entry = {"protocol": {"images": "photographs"}, "figures": {"net": {"layers": layers}}}
        (folder / "results.json").write_text(json.dumps({"equivariance": entry}))
        assert f'<div class="{classes}"><div><h3>equivariance' in written(folder)


def test_the_figures_of_upright_images_are_one_row(tmp_path: Path) -> None:
    folder = make_evaluation(tmp_path / "evaluation")
    figures = {"acc1": 80.0, "loss": 1.5, "image_loss": 1.25, "rr_acc1": 70.0, "rr_loss": 1.75}
    written_so = {"accuracy": {"protocol": {}, "figures": figures}}
    (folder / "results.json").write_text(json.dumps(written_so))
    page = written(folder)
    rows = [
        re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(<td>.*?)</tr>", page)
    ]
    assert re.findall(r'<th class="number">(.*?)</th>', page)[:3] == ["acc1", "loss", "image_loss"]
    assert rows[:2] == [["upright", "80", "1.5", "1.25"], ["rr", "70", "1.75", ""]]


def test_two_runs_are_told_side_by_side(tmp_path: Path) -> None:
    page = written(make_quickstart(tmp_path / "quickstart"))
    assert '<th class="number">octic</th><th class="number">plain</th>' in page
    row = '<td>error</td><td class="number">3.7e-07</td><td class="number">–</td>'
    assert row in page and "loss of each run" in page
    assert page.count('<section class="run"') == 2


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    """No name, key, file or figure gets out of its place in the page."""
    bad = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    folder = make_run(tmp_path / "run", name=bad)
    entry = {"protocol": {bad: bad}, "figures": {bad: bad}}
    (folder / "results.json").write_text(json.dumps({bad: entry}))
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": k, bad: k, f"{bad}_loss": k}) + "\n" for k in range(5))
    draw(folder / 'a"><b onload=x>.png', (9, 9))
    (folder / "<i>.txt").write_text("")
    page = written(folder)
    assert page.count("&lt;script&gt;") > 5


def test_a_name_that_is_no_text_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    """File names are bytes, which need not be UTF-8."""
    folder = make_run(tmp_path / "run")
    try:
        with open(os.fsencode(folder) + b"/caf\xe9.txt", "w"):
            pass
    except OSError:
        pytest.skip("this file system takes no such name")
    assert "<td>caf?.txt</td>" in written(folder)


def test_large_pictures_are_scaled_down(tmp_path: Path) -> None:
    """Noise that is no smaller in any format fits a budget, every picture of it; so does a page."""
    folder = make_evaluation(tmp_path / "evaluation")
    rng = np.random.default_rng(0)
    for index in range(3):
        noise = rng.integers(0, 255, (300, 1600, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"noise{index}.png", compress_level=0)
    paths = sorted(folder.glob("*.png"))
    found = embed(paths, budget=200_000)
    assert len(found) == 3 and sum(map(len, found.values())) < 270_000
    page = written(folder)
    assert len(page) < 5_000_000 and page.count("<img") == 4


def test_pictures_of_every_kind_and_none(tmp_path: Path) -> None:
    """Small ones stay as they are; what is no picture is none."""
    small, broken = draw(tmp_path / "a.png", (20, 10)), tmp_path / "b.png"
    broken.write_bytes(b"no picture")
    clear = tmp_path / "c.png"
    Image.new("RGBA", (2000, 30), (0, 0, 0, 0)).save(clear)
    assert shrink(small, 10_000) == ("png", small.read_bytes())
    assert shrink(broken, 10_000) is None and shrink(small, 10) is None
    assert shrink(clear, 100_000) is not None
    assert list(embed([broken, small, tmp_path / "removed.png"])) == [small]


def test_a_picture_that_is_none_is_said(tmp_path: Path) -> None:
    folder = make_evaluation(tmp_path / "evaluation")
    (folder / "broken.png").write_bytes(b"no picture")
    assert "not shown: unreadable" in written(folder)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (1e-6, 2e-6), (-3, 3), (5, 5), (0, 0), (0.49, 0.7), (1, 125_000)]
)
def test_ticks_are_few_round_and_span_the_values(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8
    assert found == sorted(set(found))


@pytest.mark.parametrize(
    ("low", "high"), [(100_000, 125_000), (1e-5, 1.04e-5), (-2e-6, 3e-6), (0, 1.25e6), (0.49, 0.7)]
)
def test_labels_tell_ticks_apart(low: float, high: float) -> None:
    """Each label reads as its tick, to a tenth of a step."""
    found = ticks(low, high, 5)
    read = [float(_tick(value, found)) for value in found]
    assert read == pytest.approx(found, abs=0.1 * (found[1] - found[0]))


def test_curves_keep_their_peaks_and_their_gaps() -> None:
    points = [(step, 0.0) for step in range(10_000)]
    points[1234] = (1234, 9.0)
    points[5000:5100] = [(step, float("nan")) for step in range(5000, 5100)]
    kept = thin(points)
    assert len(kept) <= 402 and (1234, 9.0) in kept
    assert chart("loss", {"loss": points}).count("M") >= 3, "axis, and a curve of two pieces"


def test_more_curves_than_colours_are_told() -> None:
    series = {f"probe/{k}": [(1, 1.0), (2, 2.0)] for k in range(11)}
    assert "and 3 more in metrics.jsonl" in chart("probe", series)


def test_a_page_that_cannot_be_written_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch
) -> None:
    run = make_run(tmp_path / "run")

    def full(path: Path, *_: object, **__: object) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    said = f"^cannot write {run}/report.html: No space left on device; --output FILE writes it"
    with pytest.raises(UserError, match=said):
        write_report(run)
    assert not (run / ".report.html").exists()


def test_a_page_may_go_elsewhere(tmp_path: Path) -> None:
    """Of a run that may only be read."""
    run = make_run(tmp_path / "run")
    assert write_report(run, tmp_path / "page.html") == tmp_path / "page.html"
    assert write_report(run, tmp_path) == tmp_path / "report.html"
    assert not (run / "report.html").exists()


def test_the_command(tmp_path: Path) -> None:
    """It says what it wrote; a mistake is one line and code 2."""
    make_run(tmp_path / "run")
    command = [sys.executable, "experiments/report.py"]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True)

    done = run(str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"written: .*/run/report\.html \(0\.\d\d MB\)\n", done.stdout)
    done = run(str(tmp_path / "run"), "--output", str(tmp_path / "page.html"))
    assert done.returncode == 0 and (tmp_path / "page.html").stat().st_size > 1000, done.stderr
    unwritable = ["--output", str(tmp_path / "none" / "page.html")]
    for words in (
        *([], ["--x"], [str(tmp_path / "nowhere")], [str(tmp_path / "run"), "--output"]),
        *([str(tmp_path / "run"), "again", *unwritable], [str(tmp_path / "run"), *unwritable]),
    ):
        done = run(*words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: ")
