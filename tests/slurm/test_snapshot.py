"""What was submitted is what runs, whatever becomes of the checkout meanwhile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slurm.snapshot import MAX_BYTES, ROOT, Snapshot
from utils.revision import NOTE


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for name, text in {
        "pack/code.py": "x = 1\n",
        "configs/a.yaml": "a: 1\n",
        "tests/test_x.py": "",
        "docs/page.md": "",
        "README.md": "",
        ".gitignore": "ignored/\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    run = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e@x"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "m"]):
        subprocess.run([*run, *words], check=True)
    (root / "ignored").mkdir()
    (root / "ignored" / "secret.py").write_text("")
    (root / "pack" / "new.py").write_text("y = 2\n")  # new, and not ignored
    (root / "pack" / "weights.py").write_text("#" * (MAX_BYTES + 1))
    return root


def test_it_holds_the_code_and_the_configs_and_says_what_they_were(
    checkout: Path, tmp_path: Path
) -> None:
    (checkout / "pack" / "code.py").write_text("x = 3\n")
    snapshot, folder = Snapshot(checkout), tmp_path / "code"
    assert snapshot.too_large == ["pack/weights.py"]
    assert snapshot.write(folder) and not snapshot.write(folder)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"pack/code.py", "pack/new.py", "configs/a.yaml", NOTE}
    assert (folder / "pack" / "code.py").read_text() == "x = 3\n"
    assert (folder / NOTE).read_text().endswith("-dirty\n")


def test_its_name_is_its_content(checkout: Path) -> None:
    names = {Snapshot(checkout).name, Snapshot(checkout).name}
    (checkout / "pack" / "new.py").write_text("y = 3\n")
    assert len(names) == 1 and Snapshot(checkout).name not in names


def test_without_git_it_takes_what_looks_like_code(checkout: Path, tmp_path: Path) -> None:
    before = set(Snapshot(checkout).files)
    (checkout / ".git").rename(tmp_path / "git")
    assert before <= set(Snapshot(checkout).files)


def test_names_that_are_not_utf_8(checkout: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"pack/caf\xe9.py")
    (checkout / name).write_text("z = 1\n")
    (checkout / os.fsdecode(b"pack/big\xe9.py")).write_text("#" * (MAX_BYTES + 1))
    snapshot = Snapshot(checkout)
    snapshot.write(tmp_path / "code")
    assert (tmp_path / "code" / name).read_text() == "z = 1\n"
    (note,) = snapshot.notes()
    assert note.encode() and "pack/big\ufffd.py, pack/weights.py" in note


def test_data_in_the_checkout_is_told_of(checkout: Path, monkeypatch) -> None:
    (checkout / "pack" / "weights.py").unlink()
    (checkout / "mine" / "images").mkdir(parents=True)
    for number in range(40):
        (checkout / "mine" / "images" / f"{number}.bin").write_bytes(bytes(MAX_BYTES))
    (note,) = Snapshot(checkout).notes()
    assert "has 40 MB in 43 files, 40 MB of them in mine/images:" in note
    monkeypatch.setattr("slurm.snapshot.MANY_BYTES", 50_000_000)
    assert not Snapshot(checkout).notes()


def test_run_folders_are_left_out_wherever_they_are(checkout: Path) -> None:
    before = set(Snapshot(checkout).files)
    for name in (
        *("mine/a/launches.jsonl", "mine/a/logs/rank1.log"),
        *("mine/b/.lock", "mine/b/checkpoints/4/state", "mine/b/metrics.jsonl"),
        *(f"mine/1003/code/0123456789ab/{NOTE}", "mine/1003/slurm/1003_0_log.out"),
        *("mine/c.py", "mine/checkpoints/code.py"),
    ):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("x")
    assert set(Snapshot(checkout).files) - before == {"mine/c.py", "mine/checkpoints/code.py"}


def test_python_imports_it_instead_of_the_checkout_it_stands_in(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    Snapshot().write(folder)
    program = (
        "import slurm.job, utils.run_folder as r; print(slurm.job.__file__, r.describe_code())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={"PYTHONSAFEPATH": "1", "PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"{folder}/slurm/job.py ")
    assert (folder / NOTE).read_text().strip() in done.stdout
