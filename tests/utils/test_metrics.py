"""Values reach the files raw and once; the console says means; collapse is measured."""

import io
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from utils.curves import draw_curves
from utils.errors import UserError
from utils.metrics import Metrics
from utils.metrics_file import read_metrics
from utils.sinks import check_sinks, make_sinks

ROOT = Path(__file__).parents[2]


def make(folder, **options):
    text = io.StringIO()
    console = Console(file=text, width=200, soft_wrap=True)
    return Metrics(folder, total_steps=20, console=console, **options), text


def feed(metrics, steps, *, start=0):
    for step in range(start + 1, start + steps + 1):
        for micro_batch in (0.0, 1.0):
            metrics.add({"loss": torch.tensor(step + micro_batch), "part": torch.tensor(2.0)})
        metrics.end_step(step, {"lr": 0.1 * step}, {"net": torch.tensor(3.0)})
        if metrics.due(step):
            metrics.flush()


def test_raw_values_in_the_file_median_and_mean_on_the_console(tmp_path):
    metrics, text = make(tmp_path, log_every=4, images_per_step=32)
    feed(metrics, 6)
    metrics.flush()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines] == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5]
    assert lines[2]["lr"] == pytest.approx(0.3) and lines[2]["grad_norm/net"] == 3.0
    assert "images_per_second" in lines[3] and "images_per_second" not in lines[2]
    first, second = text.getvalue().splitlines()
    assert first.startswith("step 4/20") and "eta" in first
    assert "loss 2.5000 (3.0000)" in first  # lower median of the last 20 steps, mean of all
    assert "images/s" in first and second.startswith("step 6/20")
    assert "loss 3.5000 (4.0000)" in second


def test_images_unread_on_any_rank_are_told_from_the_first_on(tmp_path, monkeypatch):
    """With the reduction that the values need anyway; a run without any writes nothing of it."""
    elsewhere = iter([0.0, 2.0, 2.0])  # what the other two ranks have met

    def all_reduce_sum(tensor):
        total = 3 * tensor
        total[-1, -1] = tensor[-1, -1] + next(elsewhere)
        return total

    monkeypatch.setattr("utils.distributed.world_size", lambda: 3)
    monkeypatch.setattr("utils.distributed.all_reduce_sum", all_reduce_sum)
    metrics, _ = make(tmp_path, log_every=100)
    for start, unread in ((0, 0), (2, 1), (4, 1)):
        feed(metrics, 2, start=start)
        metrics.flush(unread=unread)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line.get("unread_images") for line in lines] == [None, None, None, 3, None, 3]
    assert [line["loss"] for line in lines] == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5]


def test_a_resumed_run_leaves_no_line_twice(tmp_path):
    metrics, _ = make(tmp_path, log_every=1)
    feed(metrics, 8)
    metrics.record(8, {"knn/top1": 50.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # killed in mid-write
    metrics, _ = make(tmp_path, first_step=5, log_every=1)
    feed(metrics, 2, start=5)
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6, 7]


def test_what_is_not_finite_stays_valid_json(tmp_path):
    metrics, _ = make(tmp_path, log_every=1)
    metrics.record(1, {"loss": math.inf})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null}\n'
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["loss"])
    make(tmp_path, first_step=1)  # a run that goes on writes the lines anew
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null}\n'


def test_the_line_shows_the_first_figures_of_each_probe(tmp_path):
    metrics, text = make(tmp_path)
    figures = {f"knn/{k}": float(k) for k in range(6)}
    metrics.record(4, {**figures, "feature_rank": 3.0})
    shown = "step 4  knn/0 0  knn/1 1  knn/2 2  knn/3 3  feature_rank 3  (2 more in metrics.jsonl)"
    assert text.getvalue() == shown + "\n"
    assert read_metrics(tmp_path / "metrics.jsonl")[0].keys() >= figures.keys()


def test_curves_lie_over_the_steps_there_are(tmp_path, monkeypatch):
    """In every panel the same, from 0 to the last; their legends hide no curve."""
    metrics, _ = make(tmp_path, log_every=2)
    feed(metrics, 4)
    for step in (2, 3, 4):
        metrics.record(step, {"knn/top1": 50.0, "knn/top5": 60.0})
    drawn = []
    keep = lambda self, *_, **__: drawn.append(self)  # noqa: E731
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", keep)
    draw_curves(tmp_path / "metrics.jsonl")
    panels = drawn[0].axes
    assert {panel.get_title() for panel in panels} >= {"loss", "knn"}
    for panel in panels:
        assert panel.get_xlim() == (0, 4) and all(tick % 1 == 0 for tick in panel.get_xticks())
    drawn[0].draw_without_rendering()
    legend = next(panel for panel in panels if panel.get_title() == "knn").get_legend()
    assert legend.get_window_extent().x0 >= legend.axes.get_window_extent().x1
    assert panels[-1].get_xlabel() == "step"


def test_what_was_logged_twice_is_drawn_with_its_points(tmp_path, monkeypatch):
    """A probe at the middle and the end of a run; one at the end alone is no curve."""
    metrics, _ = make(tmp_path, log_every=2)
    metrics.record(2, {"knn/top1": 50.0})
    metrics.record(4, {"knn/top1": 60.0, "linear/top1": 70.0})
    drawn = []
    keep = lambda self, *_, **__: drawn.append(self)  # noqa: E731
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", keep)
    draw_curves(tmp_path / "metrics.jsonl")
    lines = {panel.get_title(): panel.get_lines()[0] for panel in drawn[0].axes}
    assert list(lines) == ["knn/top1"] and list(lines["knn/top1"].get_ydata()) == [50.0, 60.0]
    assert lines["knn/top1"].get_marker() == "o"


def test_curves_are_drawn(tmp_path):
    metrics, _ = make(tmp_path, log_every=2)
    feed(metrics, 4)
    metrics.record(4, {"knn/top1": 50.0, "feature_rank": 3.0})
    draw_curves(tmp_path / "metrics.jsonl")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_live_bar_on_a_terminal(tmp_path):
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=160)
    metrics = Metrics(tmp_path, total_steps=4, log_every=2, console=console)
    feed(metrics, 4)
    metrics.say("beside the bar")
    metrics.close()
    assert "step 4/4" in text.getvalue() and "beside the bar" in text.getvalue()


def test_lines_where_no_cursor_moves(tmp_path, monkeypatch, capsys):
    """A dumb terminal, and a log that FORCE_COLOR makes a terminal of."""
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    monkeypatch.setenv("FORCE_COLOR", "1")
    for console in (dumb, None):
        metrics = Metrics(tmp_path, total_steps=4, log_every=2, console=console)
        feed(metrics, 2)
        text = dumb.file.getvalue() if console else capsys.readouterr().out
        assert text.startswith("step 2/4  ") and "\x1b[" not in text


def test_a_step_that_was_not_finite_leaves_the_mean(tmp_path):
    metrics, text = make(tmp_path, log_every=3)
    for step, value in enumerate((1.0, math.nan, 3.0), 1):
        metrics.add({"loss": torch.tensor(value)})
        metrics.end_step(step, {}, {})
    metrics.flush()
    assert "(2.0000)" in text.getvalue()


def test_sinks_get_every_written_line(tmp_path):
    told = []
    metrics, _ = make(
        tmp_path, log_every=2, sinks=(lambda step, values: told.append((step, values)),)
    )
    feed(metrics, 4)
    assert [step for step, _ in told] == [2, 4] and told[0][1]["loss"] == 2.5


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_is_one_line(tmp_path, monkeypatch, package):
    for module in (package, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"logging.{package}=true needs the package {package}"):
        make_sinks(tmp_path, **{package: True})
    with pytest.raises(UserError, match=f"logging.{package}=true needs the package {package}"):
        check_sinks(**{package: True}, wandb_project="octic")
    check_sinks(wandb_project="octic")
    assert make_sinks(tmp_path) == ()


def test_a_setting_that_wandb_does_not_know_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "banana")
    with pytest.raises(UserError, match=r"wandb=true: mode='banana' \(WANDB_MODE\): .*'online'"):
        make_sinks(tmp_path, wandb=True)


def test_lines_wait_for_a_disk_that_is_full(tmp_path, monkeypatch, capsys):
    """One line tells of it; nothing is lost, torn or written twice."""
    metrics = Metrics(tmp_path)
    metrics.record(1, {"a": 1.0})

    class Full:
        def __init__(self, *_):
            self.file = open(*_)  # noqa: SIM115

        def __enter__(self):
            return self

        def writelines(self, lines):
            self.file.write(next(iter(lines))[:3])
            self.file.flush()
            raise OSError(28, "No space left on device")

        def __exit__(self, *_):
            self.file.close()

    with monkeypatch.context() as patch:
        patch.setattr("utils.metrics.open", Full, raising=False)
        metrics.record(2, {"a": 2.0})
        metrics.record(3, {"a": 3.0})
    metrics.record(4, {"a": 4.0})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert capsys.readouterr().out.count("No space left on device") == 1


def test_tensorboard_reads_what_was_written(tmp_path):
    (sink,) = make_sinks(tmp_path, tensorboard=True)
    sink(3, {"loss": 2.0, "knn/top1": 81.0})
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = events.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(3, 2.0)]
    assert read.Tags()["scalars"] == ["loss", "knn/top1"]
    (again,) = make_sinks(tmp_path, tensorboard=True, first_step=1)
    again(2, {"loss": 5.0})
    again(3, {"loss": 4.0})
    read = events.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(2, 5.0), (3, 4.0)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_outlives_tensorboards_full_disk(tmp_path, monkeypatch, capsys):
    """Its thread dies of it, and whatever is asked of it later raises that error."""
    writers = pytest.importorskip("tensorboard.summary.writer.record_writer")
    (sink,) = make_sinks(tmp_path, tensorboard=True)
    sink(1, {"loss": 2.0})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writers.RecordWriter, "write", full)
    for step in (2, 3, 4):
        sink(step, {"loss": 1.0})
    (note,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("note: ")]
    assert note.startswith("note: TensorBoard takes no more values (OSError: [Errno 28] No space")


WANDB = """
import sys
from pathlib import Path
from utils.errors import UserError
from utils.sinks import make_sinks
try:
    (sink,) = make_sinks(Path(sys.argv[1]), wandb=True)
except UserError as error:
    sys.exit(f"error: {error}")
sink(1, {"loss": 2.0})
"""


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_wandb_continues_the_run_of_the_folder(tmp_path, mode):
    pytest.importorskip("wandb")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    env = {**clean, "WANDB_MODE": mode, "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    command, run = [sys.executable, "-c", WANDB, str(tmp_path / "run")], tmp_path / "run"
    run.mkdir()
    for start in (1, 2):
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if mode == "online":  # nobody has logged in
            assert done.returncode == 1 and "Traceback" not in done.stderr
            (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
            assert line.startswith("error: logging.wandb=true: ") and "WANDB_MODE=offline" in line
            return
        assert done.returncode == 0, done.stderr
        curve = (run / "wandb_id.txt").read_text().strip()
        assert len({*run.glob("wandb/offline-run-*")}) == start
        assert all(path.name.endswith(curve) for path in run.glob("wandb/offline-run-*"))


LOST = """
import os, signal, sys
from pathlib import Path
from utils.sinks import make_sinks
(sink,) = make_sinks(Path(sys.argv[1]), wandb=True)
sink(1, {"loss": 2.0})
for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
    if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes():
        os.kill(int(pid), signal.SIGTERM)
        os.waitid(os.P_PID, int(pid), os.WEXITED | os.WNOWAIT)
for step in range(2, 6):
    sink(step, {"loss": 1.0})
sys.exit(143)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="finds W&B's process in /proc")
def test_a_run_outlives_wandbs_process(tmp_path):
    pytest.importorskip("wandb")
    env = {**os.environ, "WANDB_MODE": "offline", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", LOST, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 143 and "Traceback" not in done.stderr, done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("note: ")]
    assert line.startswith("note: Weights & Biases takes no more values (ConnectionResetError")
