"""A checkpoint exists whole or not at all; a damaged one is named; a full disk harms nothing."""

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from utils.checkpoints import shards
from utils.checkpoints.checkpoint import Checkpoints
from utils.checkpoints.files import Parts
from utils.checkpoints.index import pack
from utils.errors import UserError

ROOT = Path(__file__).parents[3]
SHARD = "00000.safetensors"


def parts(step: int) -> dict:
    return {"recipe": {"weight": torch.full((100,), float(step))}, "progress": {"scaler": {}}}


def value(found) -> float:
    return found[1]["recipe"]["weight"][0].item()


def test_save_and_load(tmp_path):
    checkpoints = Checkpoints(tmp_path, fingerprint="abc")
    assert checkpoints.load() is None
    assert checkpoints.save(7, parts(7)) == ""
    step, read, notes = checkpoints.load()
    description = read.description
    assert (step, notes) == (7, [])
    assert torch.equal(read["recipe"]["weight"], torch.full((100,), 7.0))
    assert (description["world_size"], description["fingerprint"]) == (1, "abc")
    assert (tmp_path / "last").read_text() == "7\n"


def test_every_value_comes_back_as_it_was(tmp_path):
    """Layouts, types and keys that JSON or safetensors alone would change."""
    whole = torch.arange(12.0).reshape(3, 4)
    saved = {
        "tensors": {
            "scalar": torch.tensor(3.5, dtype=torch.float64),
            "empty": torch.zeros(0, 4, dtype=torch.int16),
            "transposed": whole.T,
            "view": whole[1],
            "again": whole,
            "half": torch.ones(2, dtype=torch.bfloat16),
            "flags": torch.tensor([True, False]),
            "bytes": torch.arange(5, dtype=torch.uint8),
            "parameter": torch.nn.Parameter(torch.ones(2)),
        },
        "plain": {
            "tuple": (1, 2.5, None),
            "keys": {0: "a", "$odd": [True]},
            "exact": 0.1 + 0.2,
            "large": 2**63,
            "nan": float("inf"),
            "nested": [{"x": torch.ones(1)}, ()],
        },
    }
    assert Checkpoints(tmp_path).save(1, saved) == ""
    found = Checkpoints(tmp_path).load()[1]
    assert list(found) == ["tensors", "plain"]
    for name, tensor in found["tensors"].items():
        expected = saved["tensors"][name]
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
    plain = found["plain"]
    nested, expected = plain.pop("nested"), {**saved["plain"]}
    expected.pop("nested")
    assert plain == expected and type(plain["tuple"]) is tuple
    assert torch.equal(nested[0]["x"], torch.ones(1)) and nested[1] == ()
    with pytest.raises(TypeError, match="plain: a checkpoint cannot hold a PosixPath"):
        Checkpoints(tmp_path).save(2, {"plain": Path("x")})


def test_two_tensors_of_one_name_are_refused():
    """One of them would be lost."""
    one = torch.ones(2)
    with pytest.raises(ValueError, match="two tensors of a checkpoint are called net/a/b"):
        pack({"a/b": one, "a": {"b": one}}, "net", {})


def test_tensors_may_change_once_a_save_has_begun(tmp_path, monkeypatch):
    """The copy is taken before `start` returns; what is written is what was there then."""
    real, gate = shards.save_file, threading.Event()
    monkeypatch.setattr(shards, "save_file", lambda *a: gate.wait(20) and real(*a))
    checkpoints, weight = Checkpoints(tmp_path), torch.zeros(50)
    checkpoints.start(1, {"recipe": {"weight": weight}})
    weight.fill_(9.0)
    assert checkpoints.steps() == [] and not (tmp_path / "last").exists()
    gate.set()
    assert checkpoints.wait() == "" == checkpoints.wait()
    assert value(checkpoints.load()) == 0.0 and checkpoints.newest == 1


def test_a_checkpoint_of_the_step_may_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, parts(1))
    checkpoints.save(1, parts(2), replace=False)
    assert value(checkpoints.load()) == 1.0
    checkpoints.save(1, parts(2))
    assert value(checkpoints.load()) == 2.0


def test_keep_last_and_keep_every(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=10, keep_last=2, keep_every=30)
    for step in range(10, 71, 10):
        assert checkpoints.due(step) and not checkpoints.due(step + 1)
        checkpoints.save(step, parts(step))
    assert checkpoints.steps() == [30, 50, 60, 70]
    assert sorted(p.name for p in tmp_path.iterdir() if not p.is_dir()) == ["last"]


@pytest.mark.parametrize(
    "options", [{"keep_last": 0}, {"every": -1}, {"keep_every": -5}, {"keep_last": 2.5}]
)
def test_numbers_without_a_meaning_are_refused_in_one_line(options):
    (key,) = options
    with pytest.raises(UserError, match=rf"checkpoint\.{key} must be a whole number from \d"):
        Checkpoints(Path("x"), **options)


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
    (note,) = found[2]
    assert str(tmp_path / "2") in note and "resuming from step 1" in note and "\n" not in note


def test_only_damaged_checkpoints_are_refused_in_one_line(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, parts(2))
    damage(tmp_path / "2", "truncate")
    with pytest.raises(UserError, match=r"safetensors is truncated: \d+ of \d+ bytes") as caught:
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

    def full(tensors, path):
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "save_file", full)
        problem = checkpoints.save(2, parts(2))
    assert "No space left on device" in problem and "the one of step 1 stays" in problem
    assert "\n" not in problem
    assert checkpoints.news() == problem and checkpoints.news() == ""
    assert checkpoints.newest == 1 and checkpoints.load()[0] == 1
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert checkpoints.save(2, parts(2)) == "" and checkpoints.newest == 2


@pytest.mark.parametrize("stage", ["index", "rename", "last"])
def test_a_failure_after_the_tensors_leaves_a_sound_checkpoint(tmp_path, monkeypatch, stage):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, parts(1))

    def fail(*_):
        raise OSError(5, "Input/output error")

    name = {"index": "write_json", "rename": "os.rename", "last": "write_text"}[stage]
    with monkeypatch.context() as patch:
        patch.setattr(f"utils.checkpoints.checkpoint.{name}", fail)
        problem = checkpoints.save(2, parts(2))
    assert "Input/output error" in problem and "\n" not in problem
    assert problem.endswith(": the one of step 1 stays")
    assert (f"{tmp_path}/last: Input/output error" in problem) == (stage == "last")
    found = Checkpoints(tmp_path).load()
    assert found[2] == [] and value(found) == found[0]


def test_a_real_full_file_system(tmp_path):
    """The same where the kernel says no: a process that may write only so much per file."""
    code = (
        "import resource, signal, sys, torch; from pathlib import Path\n"
        "from utils.checkpoints.checkpoint import Checkpoints\n"
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


@pytest.mark.slow
def test_killed_in_mid_save_the_last_good_one_stays(tmp_path):
    code = (
        "import sys, torch; from pathlib import Path\n"
        "from utils.checkpoints.checkpoint import Checkpoints\n"
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
        assert found is not None and found[2] == [] and value(found) == found[0]
        assert not list(folder.glob(".w*"))


def test_a_replacement_killed_between_its_renames_is_undone(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, parts(4))
    os.rename(tmp_path / "4", tmp_path / ".replaced-4")
    assert checkpoints.load()[0] == 4


def test_what_a_killed_save_left_is_no_obstacle(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, parts(4))
    for name in (".writing-5", ".removing-3"):
        (tmp_path / name).mkdir()
    (tmp_path / ".last.1a2b3c4d.partial").write_text("5")
    assert checkpoints.load()[0] == 4 and checkpoints.save(5, parts(5)) == ""
    assert {path.name for path in tmp_path.iterdir()} == {"4", "5", "last"}


class Hostile:
    def __init__(self, folder: Path) -> None:
        self.command = f"touch {folder / 'owned'}"

    def __reduce__(self):
        return (os.system, (self.command,))


def forge(folder: Path, name: str, data: bytes) -> None:
    """Put a file into a checkpoint, with the hash it has, as one who can write there would."""
    (folder / name).write_bytes(data)
    description = json.loads((folder / "checkpoint.json").read_text())
    sha256 = hashlib.sha256(data).hexdigest()
    description["files"][name] = {"bytes": len(data), "sha256": sha256}
    (folder / "checkpoint.json").write_text(json.dumps(description))


@pytest.mark.parametrize("name", [SHARD, "index.json", "checkpoint.json", ".metadata"])
def test_a_hostile_pickle_executes_nothing(tmp_path, name):
    """Whatever file of a checkpoint is one."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, parts(1))
    data = pickle.dumps(Hostile(tmp_path))
    if name == "checkpoint.json":
        (tmp_path / "1" / name).write_bytes(data)
    else:
        forge(tmp_path / "1", name, data)
    try:
        found = checkpoints.load()
        assert value(found) == 1.0 and name == ".metadata"
    except UserError as error:
        assert "\n" not in str(error) and str(tmp_path / "1") in str(error)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "edit",
    [
        lambda index: index["tensors"]["recipe/weight"].update(shape=[10**15]),
        lambda index: index["tensors"]["recipe/weight"].update(dtype="load"),
        lambda index: index["tensors"]["recipe/weight"]["pieces"][0].__setitem__(0, "../../x"),
        lambda index: index["tensors"]["recipe/weight"]["pieces"].clear(),
        lambda index: index["content"].update(recipe={"$tensor": "another"}),
        lambda index: index.update(tensors=[]),
    ],
)
def test_a_forged_index_is_refused_in_one_line(tmp_path, edit):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, parts(1))
    index = json.loads((tmp_path / "1" / "index.json").read_text())
    edit(index)
    forge(tmp_path / "1", "index.json", json.dumps(index).encode())
    with pytest.raises(UserError, match=r"index\.json cannot be used") as caught:
        checkpoints.load()
    assert "\n" not in str(caught.value)


def save_as_format_1(folder: Path, step: int, parts: dict) -> None:
    """What this project wrote before it wrote shards: one torch file per part."""
    (folder / str(step)).mkdir(parents=True)
    files = {}
    for name, content in parts.items():
        path = folder / str(step) / f"{name}.pt"
        torch.save(content, path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256}
    description = {
        "format": 1,
        "step": step,
        "world_size": 1,
        "fingerprint": "",
        "torch": torch.__version__,
        "files": files,
    }
    text = json.dumps(description, indent=1) + "\n"
    (folder / str(step) / "checkpoint.json").write_text(text)
    (folder / "last").write_text(f"{step}\n")


def test_format_1_is_read_and_format_2_written_beside_it(tmp_path):
    save_as_format_1(tmp_path, 3, parts(3))
    checkpoints = Checkpoints(tmp_path)
    found = checkpoints.load()
    assert (found[0], value(found), found[1]["progress"]) == (3, 3.0, {"scaler": {}})
    checkpoints.save(4, parts(4))
    assert value(checkpoints.load()) == 4.0 and checkpoints.steps() == [3, 4]
    damage(tmp_path / "4", "flip")
    assert checkpoints.load()[0] == 3


def test_a_hostile_pickle_of_format_1_executes_nothing(tmp_path):
    save_as_format_1(tmp_path, 3, {"recipe": {"weight": Hostile(tmp_path)}})
    with pytest.raises(UserError, match=r"recipe\.pt cannot be read") as caught:
        Checkpoints(tmp_path).load()[1]["recipe"]
    assert "\n" not in str(caught.value) and not (tmp_path / "owned").exists()


def test_a_format_of_the_future_is_refused_in_one_line(tmp_path):
    Checkpoints(tmp_path).save(1, parts(1))
    path = tmp_path / "1" / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3}))
    with pytest.raises(UserError, match="has format 3, this version reads 1 and 2"):
        Parts(tmp_path / "1")


def test_whoever_may_read_the_run_folder_may_read_its_checkpoints(tmp_path):
    """safetensors makes its files private, which colleagues on a cluster would find out."""
    (tmp_path / "usual").write_text("")
    Checkpoints(tmp_path).save(1, parts(1))
    modes = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "usual").stat().st_mode}


def damage(folder: Path, harm: str) -> None:
    path = folder / ("checkpoint.json" if harm == "description" else SHARD)
    data = path.read_bytes()
    if harm in ("truncate", "description"):
        path.write_bytes(data[: len(data) // 2])
    elif harm == "flip":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    else:
        path.unlink()
