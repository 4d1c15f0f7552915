"""The speed table: what is taken, stopped, skipped and kept, by real processes."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluation.commands import speed as speed_command
from evaluation.cost import child, machine, speed
from evaluation.cost.scaling import work_of
from evaluation.cost.speed import Session
from evaluation.cost.speed_figures import tables_of, write_markdown
from evaluation.cost.speed_list import Measurement, read_list
from slurm.command import capture
from utils.config.build import plain
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
FACTS = {
    **{
        "device_type": "cpu",
        "device": "a device",
        "auto_precision": "fp32",
        "driver": None,
        "python": "3",
        "torch": "2",
    },
    **{"triton": None, "timm": "1", "cores": 4, "code": "abc torch 2"},
}
SAYS = "import sys; print('said', *sys.argv[1:])"
FAILS = "raise SystemExit('it cannot be')"
# Starts a child that no Ctrl-C ends, says that both are there, and stays.
STAYS = """
import os, subprocess, sys, time
deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", deaf], stderr=subprocess.DEVNULL)
open(sys.argv[1] + ".new", "w").write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
try:
    time.sleep(600)
except KeyboardInterrupt:
    print("kept", flush=True)
    sys.exit(130)
"""
IGNORES = "import signal\nfor n in (2, 15): signal.signal(n, signal.SIG_IGN)\n" + STAYS
INTERRUPTS = """
import os, signal, time
os.kill(os.getppid(), signal.SIGINT)
time.sleep(600)
"""


@pytest.fixture
def make(tmp_path):
    """Makes a measurement of a program's text."""

    def measurement(name, text=SAYS, *words, minutes=5.0, **more):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        return Measurement(name, f"what {name} tells", (str(path), *words), minutes, **more)

    return measurement


def take(folder, measurements, end=None, **more):
    """A session of its own: its exit code and the states of its measurements."""
    session = Session(folder, measurements, {**FACTS, **more.pop("facts", {})}, **more)
    code = session.take(measurements, end)
    return code, {name: state for name, (state, _) in session.rows.items()}


def stop_once(path):
    """Interrupts that count one from when `path` is there."""

    class When(child.Interrupts):
        @property
        def count(self):
            return int(path.exists())

        @count.setter
        def count(self, value):
            pass

    return When()


def is_gone(pid):
    """Within some seconds, a zombie counting as gone."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_one_after_the_other_shown_logged_and_tabled(tmp_path, make, capsys):
    folder = tmp_path / "out"
    code, states = take(folder, [make("b", SAYS, "{out}.json", "{workers}"), make("a")])
    assert code == 0 and list(states.items()) == [("b", "done"), ("a", "done")]
    assert (folder / "b.log").read_text() == f"said {folder}/b.json 2\n"
    out = capsys.readouterr().out
    assert out.index("b: what b tells, at most 5 min") < out.index(f"said {folder}/b.json 2")
    assert out.index("b: done in") < out.index("a: what a tells")
    assert "measurements" in out and str(folder / "a.log") in out
    noted = json.loads((folder / "state.json").read_text())["measurements"]
    assert noted["a"]["state"] == "done" and noted["a"]["exit_code"] == 0
    assert noted["a"]["code"] == FACTS["code"] and not (folder / ".lock").exists()


def test_what_is_done_is_skipped_by_the_same_command_code_and_device(tmp_path, make, capsys):
    def states(*words, **more):
        return take(tmp_path / "out", [make("a", SAYS, *words), make("b")], **more)[1]

    assert states() == {"a": "done", "b": "done"}
    assert states() == {"a": "earlier", "b": "earlier"}
    assert "--again measures it anew" in capsys.readouterr().out
    assert states("other") == {"a": "done", "b": "earlier"}
    assert states("other", again=True) == {"a": "done", "b": "done"}
    for changed in ({"code": "abd torch 2"}, {"device": "another device"}):
        assert states("other", facts=changed) == {"a": "done", "b": "done"}


def test_a_failure_is_one_line_and_the_others_go_on(tmp_path, make, capsys):
    measurements = [make("a", FAILS), make("b")]
    assert take(tmp_path / "out", measurements) == (1, {"a": "failed", "b": "done"})
    log = tmp_path / "out" / "a.log"
    assert f"(exit code 1); see {log}" in capsys.readouterr().out
    assert log.read_text() == "it cannot be\n"
    assert take(tmp_path / "out", measurements) == (1, {"a": "failed", "b": "earlier"})


def test_what_an_earlier_try_left_is_set_aside(tmp_path, make):
    writes = "import sys; open(sys.argv[1], 'x').write(str(len(sys.argv)))"
    folder = tmp_path / "out"
    take(folder, [make("a", writes, "{out}.json")])
    take(folder, [make("a", writes, "{out}.json", "more")])
    assert (folder / "a.json").read_text() == "3"
    assert (folder / "before" / "a" / "a.json").read_text() == "2"


def test_what_nobody_needs_is_discarded(tmp_path, make):
    makes = "import os, sys; [os.makedirs(f'{sys.argv[1]}/{d}') for d in ('big', 'small')]"
    take(tmp_path / "out", [make("a", makes, "{out}", discard=("big",))])
    assert [path.name for path in (tmp_path / "out" / "a").iterdir()] == ["small"]


def test_a_limit_stops_a_command_with_its_children(tmp_path, make, capsys):
    ready = tmp_path / "ready"
    measurements = [make("a", STAYS, str(ready), minutes=0.1), make("b")]
    assert take(tmp_path / "out", measurements) == (0, {"a": "stopped", "b": "done"})
    assert all(is_gone(pid) for pid in ready.read_text().split())
    assert (tmp_path / "out" / "a.log").read_text() == "kept\n"
    assert "a: stopped at its limit after 6 s; what it wrote stays" in capsys.readouterr().out
    assert take(tmp_path / "out", measurements[:1], end=0.0)[1] == {"a": "left out"}


def test_a_command_that_will_not_end_is_killed(tmp_path, make):
    ready = tmp_path / "ready"
    command = [sys.executable, make("a", IGNORES).words[0], str(ready)]
    graces = tuple((number, 0.2) for number, _ in child.GRACES)
    ended = child.run(
        command,
        tmp_path / "a.log",
        limit_s=600,
        interrupts=stop_once(ready),
        graces=graces,
    )
    assert ended.code == -signal.SIGKILL and ended.cause == child.INTERRUPT
    assert all(is_gone(pid) for pid in ready.read_text().split())


def test_output_is_logged_where_the_terminal_is_gone(tmp_path, make, monkeypatch):
    class Gone:
        def write(self, text):
            raise OSError("there is no terminal")

    command = [sys.executable, make("a").words[0]]
    monkeypatch.setattr(sys, "stdout", Gone())
    ended = child.run(command, tmp_path / "log", limit_s=60, interrupts=child.Interrupts())
    monkeypatch.undo()
    assert (ended.code, ended.cause) == (0, None)
    assert (tmp_path / "log").read_text() == "said\n"


def test_nothing_runs_on_after_an_error_of_ours(tmp_path, make, monkeypatch):
    def full(self, seconds):
        if (tmp_path / "ready").exists():
            raise OSError("no space left on device")
        time.sleep(seconds)

    monkeypatch.setattr(child._Output, "pass_on", full)
    command = [sys.executable, make("a", STAYS).words[0], str(tmp_path / "ready")]
    with pytest.raises(OSError, match="no space left"):
        child.run(command, tmp_path / "log", limit_s=60, interrupts=child.Interrupts())
    assert all(is_gone(pid) for pid in (tmp_path / "ready").read_text().split())


def test_a_budget_is_kept(tmp_path, make, capsys):
    measurements = [make("a", STAYS, str(tmp_path / "ready")), make("b")]
    end = time.monotonic() + 5
    assert take(tmp_path / "out", measurements, end=end)[1] == dict.fromkeys("ab", "left out")
    assert "a: left out, as " in capsys.readouterr().out
    end = time.monotonic() + 5
    code, states = take(tmp_path / "out", measurements, end=end, least_s=1.0)
    assert code == 0 and states == {"a": "stopped", "b": "left out"}
    assert "a: stopped at the end of the budget" in capsys.readouterr().out


def test_an_interrupt_keeps_the_table(tmp_path, make, capsys):
    measurements = [make("a"), make("b", INTERRUPTS), make("c")]
    code, states = take(tmp_path / "out", measurements)
    assert code == 130 and states == {"a": "done", "b": "stopped", "c": "left out"}
    out = capsys.readouterr().out
    assert "b: interrupted after" in out and "left out" in out.partition("measurements")[2]
    assert take(tmp_path / "out", measurements[::2])[1] == {"a": "earlier", "c": "done"}


def test_the_command_stopped_by_sigterm(tmp_path, make):
    ready, config, folder = tmp_path / "ready", tmp_path / "own.yaml", tmp_path / "out"
    script = make("a", STAYS).words[0]
    config.write_text(
        f"cpu:\n  a: {{tells: it, minutes: 5, command: '{script} {ready}'}}\n"
        f"  b: {{tells: it, minutes: 5, command: '{script} {ready}'}}\n"
    )
    command = [sys.executable, "experiments/speed.py", "--config", config, "--out", folder]
    process = subprocess.Popen(
        [*command, "--device", "cpu"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    while not ready.exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "kept" in out
    assert all(is_gone(pid) for pid in ready.read_text().split())
    table = out.partition("\nmeasurements\n")[2]
    assert "│ a           │  stopped │" in table and "│ b           │ left out │" in table
    assert json.loads((folder / "state.json").read_text())["measurements"]["a"]["exit_code"] == 130


@pytest.fixture
def here(monkeypatch):
    """The facts of a machine, without a process that asks torch for them."""
    monkeypatch.setattr(machine, "ask", lambda: dict(FACTS))


def test_the_list_is_shown_with_states_and_nothing_is_run(tmp_path, here, capsys):
    assert speed_command.main(["--list", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("no CUDA device here") and "at most 20 min; not measured" in out
    command = "complexity.py --models hybrid_deit_base_patch16 --batch-size 8 --steps 20 --rounds 5"
    assert f".venv/bin/python experiments/{command} --json {tmp_path}/out/vit_b.json" in out
    assert not (tmp_path / "out").exists()
    session = Session(tmp_path / "out", read_list("cpu"), FACTS)
    (tmp_path / "out").mkdir()
    session._note(session.measurements[0], state="done", seconds=12.3)
    speed_command.main(["--list", "--out", str(tmp_path / "out"), "--only", "blocks"])
    assert "(at most 5 min; done in 12 s)" in capsys.readouterr().out


def test_facts_are_asked_of_a_process():
    facts = machine.ask()
    assert facts.keys() == FACTS.keys() and facts["cores"] >= 1
    assert facts["code"].split()[0] in machine.in_words(facts)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--only", "vit_d"],
            "there is no measurement 'vit_d'; did you mean 'vit_b'? (blocks, vit",
        ),
        (["--minutes", "0"], "--minutes must be more than 0, got 0"),
        (["--minutes", "nan"], "--minutes must be more than 0, got nan"),
        (["--device", "cud"], "--device is auto, cuda or cpu, not 'cud'; did you mean 'cuda'?"),
        (["--device", "cuda"], "the list for cuda needs a CUDA device, and torch sees none here"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
        (["--out", "Makefile"], "--out Makefile: File exists"),
    ],
)
def test_mistakes_are_one_line(words, said, here, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as left:
        speed_command.main(words)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, make, monkeypatch):
    """It is not standard output that takes no more."""

    def full(path, *text, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"out/state\.json: No space left on device"):
        Session(tmp_path / "out", [], FACTS).take([Measurement("a", "tells", (), 5.0)], None)


def test_a_state_that_cannot_be_read_is_one_line(tmp_path, make):
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json cannot be read"):
        Session(tmp_path, [make("a")], FACTS)


def comparison():
    """A file of experiments/complexity.py, shortened."""
    speed = {"images_per_second": 1234.0, "mfu": 0.25, "peak_mib": 100.4, "times_the_twin": None}
    protocol = {"arithmetic": "bf16", "mode": "compiled", "batch_size": 64, "peak_flops": 1e11}
    ratio = {"median": 1.5, "least": 1.4, "greatest": 1.6}
    nets = {
        "plain": {"out_of_memory": ["training step"], "passes": {"inference": speed}},
        "octic": {
            "out_of_memory": [],
            "passes": {"inference": {**speed, "peak_mib": None, "times_the_twin": ratio}},
        },
    }
    return {"protocol": {**protocol, "passes": ["inference", "training step"]}, "models": nets}


def training(folder, model, rates):
    """A run folder of DINOv2 with a small net, as far as it is read."""
    _, parse = capture(ROOT / "experiments" / "train_dinov2.py")
    words = [f"backbone={model}", "backbone.depth=2", "training.precision=bf16"]
    config = plain(parse([*words, "--output-dir", str(folder)]))
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps(config))
    lines = [
        {"step": n, "images_per_second": rate, "memory_gb": n / 2} for n, rate in enumerate(rates)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_figures_become_tables_and_markdown(tmp_path, make):
    (tmp_path / "nets.json").write_text(json.dumps(comparison()))
    time = {"mode": "eager", "pass": "forward", "microseconds": 50.2, "times_the_last": 2.0}
    blocks = {"protocol": "it", "blocks": {"net": [{"block": "OcticBlock", **time}]}}
    (tmp_path / "blocks.json").write_text(json.dumps(blocks))
    data = {"protocol": {}, "figures": {"2 x 224/ours/worker": 12.34}}
    (tmp_path / "data.json").write_text(json.dumps(data))
    (tmp_path / "torn.json").write_text('{"protocol": ')
    training(tmp_path / "plain", "dinov2_vit_small_patch16", [1, 2, 100, 110, 90])
    training(tmp_path / "hybrid", "hybrid_dinov2_vit_small_patch16", [1, 2, 130])
    names = ["nets", "blocks", "data", "torn", "none", "plain"]
    measurements = [*map(make, names), make("hybrid", twin="plain")]
    nets, blocks, data = tables_of(tmp_path, measurements, FACTS)
    mode = "bf16, compiled, batch 64"
    assert nets.rows[:3] == [
        ["plain", "inference", mode, "1234", None, "25.0", "100"],
        ["plain", "training step", mode, "out of memory", None, None, None],
        ["octic", "inference", mode, "1234", "1.50 (1.40-1.60)", "25.0", None],
    ]
    twin, hybrid = nets.rows[3:]
    assert twin[:2] == ["dinov2_vit_small_patch16", "DINOv2 step"]
    assert twin[3:5] == ["100 (90.0-110)", None] and hybrid[3:5] == ["130 (130-130)", "1.30"]
    for row, rate, mib in ((twin, 100, "2048"), (hybrid, 130, "1024")):  # the most of a window
        folder = "plain" if row is twin else "hybrid"
        work = work_of(str(tmp_path / folder / "config.yaml"))[0].operations_per_image
        assert float(row[5]) == pytest.approx(100 * rate * work / 1e11, abs=0.05)
        assert float(row[5]) > 10 and row[6] == mib
    assert blocks.rows == [["net", "OcticBlock", "eager", "50", "2.00", None, None]]
    assert data.rows == [["2 x 224", "ours", "one core", "12.3"]]
    (turned,) = tables_of(tmp_path, measurements[:-3:-1], FACTS)
    assert turned.rows[0][4] == "1.30", "a twin may also stand behind"
    path = write_markdown(tmp_path / "t.md", [nets, blocks, data], "a machine", ["python x.py"])
    text = path.read_text()
    assert text.startswith(
        "a machine.\n\n```bash\npython x.py\n```\n\nSpeed of whole nets:\n\n| net"
    )
    assert f"| octic | inference | {mode} |" in text and "| 1.50 (1.40-1.60) | 25.0 | - |" in text


def test_a_markdown_table_is_kept_of_the_whole_list(tmp_path, make):
    """Also where a later command asks for a part of it."""
    writes = f"import sys; open(sys.argv[1], 'w').write({json.dumps(comparison())!r})"
    folder, measurements = tmp_path / "out", [make("a", writes, "{out}.json"), make("b")]
    take(folder, measurements)
    session = Session(folder, measurements, FACTS, again=True)
    assert session.take(measurements[1:], None) == 0
    text = (folder / speed.TABLE).read_text()
    assert "| octic | inference |" in text and f"a.py {folder}/a.json" in text
