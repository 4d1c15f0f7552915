"""A checkpoint exists whole or not at all; a damaged one is named; a full disk harms nothing."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from utils import checkpoint
from utils.checkpoint import Checkpoints, export_weights
from utils.errors import UserError

ROOT = Path(__file__).parents[2]


def parts(step: int) -> dict:
    return {"recipe": {"weight": torch.full((100,), float(step))}, "progress": {"scaler": {}}}


def value(found) -> float:
    return found[1]["recipe"]["weight"][0].item()


def test_save_and_load(tmp_path):
    checkpoints = Checkpoints(tmp_path, fingerprint="abc")
    assert checkpoints.load() is None
    assert checkpoints.save(7, parts(7)) == ""
    step, read, description, notes = checkpoints.load()
    assert (step, notes) == (7, [])
    assert torch.equal(read["recipe"]["weight"], torch.full((100,), 7.0))
    assert (description["world_size"], description["fingerprint"]) == (1, "abc")
    assert (tmp_path / "last").read_text() == "7\n"


def test_keep_last_and_keep_every(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=10, keep_last=2, keep_every=30)
    for step in range(10, 101, 10):
        assert checkpoints.due(step) and not checkpoints.due(step + 1)
        checkpoints.save(step, parts(step))
    assert checkpoints.steps() == [30, 60, 80, 90, 100]
    assert sorted(p.name for p in tmp_path.iterdir() if not p.is_dir()) == ["last"]


def test_without_a_period_none_is_due():
    assert not any(Checkpoints(Path("x"), every=0).due(step) for step in range(5))


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "description"])
def test_a_damaged_checkpoint_is_named_and_the_previous_used(tmp_path, harm):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, parts(1))
    checkpoints.save(2, parts(2))
    damage(tmp_path / "2", harm)
    found = checkpoints.load()
    assert (found[0], value(found)) == (1, 1.0)
    (note,) = found[3]
    assert str(tmp_path / "2") in note and "resuming from step 1" in note and "\n" not in note


def test_only_damaged_checkpoints_are_refused_in_one_line(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, parts(2))
    damage(tmp_path / "2", "truncate")
    with pytest.raises(UserError, match=r"recipe\.pt is truncated: \d+ of \d+ bytes") as caught:
        checkpoints.load()
    assert "\n" not in str(caught.value)


def test_last_may_point_back(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (1, 2, 3):
        checkpoints.save(step, parts(step))
    (tmp_path / "last").write_text("2\n")
    assert checkpoints.load()[0] == 2
    checkpoints.save(3, parts(33))
    assert value(checkpoints.load()) == 33.0


def test_a_full_disk_leaves_the_old_one_and_one_line(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, parts(1))

    class Full:
        def __init__(self, file):
            self.file, self.room = file, 300

        def write(self, data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    real = open
    monkeypatch.setattr(
        checkpoint,
        "open",
        lambda p, m="r": Full(real(p, m)) if m == "wb" else real(p, m),
        raising=False,
    )
    problem = checkpoints.save(2, parts(2))
    monkeypatch.undo()
    assert "No space left on device" in problem and "the one of step 1 stays" in problem
    assert "\n" not in problem
    assert checkpoints.load()[0] == 1
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_real_full_file_system(tmp_path):
    """The same where the kernel says no: a process that may write only so much per file."""
    code = (
        "import resource, signal, sys, torch; from pathlib import Path\n"
        "from utils.checkpoint import Checkpoints\n"
        "c = Checkpoints(Path(sys.argv[1])); c.save(1, {'recipe': {'w': torch.zeros(10)}})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "print(c.save(2, {'recipe': {'w': torch.zeros(100000)}})); print(c.load()[0])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "not written" in first and "step 1 stays" in first and second == "1"


def test_killed_in_mid_save_the_last_good_one_stays(tmp_path):
    code = (
        "import sys, torch; from pathlib import Path; from utils.checkpoint import Checkpoints\n"
        "c = Checkpoints(Path(sys.argv[1]), keep_last=1); step = 0\n"
        "while True:\n"
        "    step += 1; c.save(step, {'recipe': {'weight': torch.full((200000,), float(step))}})\n"
    )
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        process = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT)
        deadline = time.monotonic() + 100
        while not (folder / "last").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.017 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        checkpoints = Checkpoints(folder)
        found = checkpoints.load()
        assert found is not None and found[3] == [] and value(found) == found[0]
        assert not list(folder.glob(".w*"))


def test_a_replacement_killed_between_its_renames_is_undone(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, parts(4))
    os.rename(tmp_path / "4", tmp_path / ".replaced-4")
    assert checkpoints.load()[0] == 4


def test_a_hostile_pickle_executes_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, parts(1))

    class Hostile:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'owned'}",))

    path = tmp_path / "1" / "recipe.pt"
    torch.save({"weight": Hostile()}, path)
    description = json.loads((tmp_path / "1" / "checkpoint.json").read_text())
    description["files"]["recipe.pt"] = {
        "bytes": path.stat().st_size,
        "sha256": checkpoint._hash(path),
    }
    (tmp_path / "1" / "checkpoint.json").write_text(json.dumps(description))
    with pytest.raises(pickle.UnpicklingError):
        checkpoints.load()
    assert not (tmp_path / "owned").exists()


def test_exported_weights_carry_their_metadata(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    path = tmp_path / "exported" / "net.safetensors"
    export_weights(path, {"a": shared.T, "b": shared[0]}, {"constructor": "{}"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"constructor": "{}"}
        assert torch.equal(file.get_tensor("a"), shared.T)
    assert [p.name for p in path.parent.iterdir()] == ["net.safetensors"]


def damage(folder: Path, harm: str) -> None:
    path = folder / ("checkpoint.json" if harm == "description" else "recipe.pt")
    data = path.read_bytes()
    if harm in ("truncate", "description"):
        path.write_bytes(data[: len(data) // 2])
    elif harm == "flip":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    else:
        path.unlink()
