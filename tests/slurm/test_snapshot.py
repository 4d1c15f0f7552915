"""What was submitted is what runs, whatever becomes of the checkout meanwhile."""

import subprocess
import sys
from pathlib import Path

import pytest

from slurm.snapshot import MAX_BYTES, REVISION, ROOT, Snapshot


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
    assert found == {"pack/code.py", "pack/new.py", "configs/a.yaml", REVISION}
    assert (folder / "pack" / "code.py").read_text() == "x = 3\n"
    assert (folder / REVISION).read_text().endswith("-dirty\n")


def test_its_name_is_its_content(checkout: Path) -> None:
    names = {Snapshot(checkout).name, Snapshot(checkout).name}
    (checkout / "pack" / "new.py").write_text("y = 3\n")
    assert len(names) == 1 and Snapshot(checkout).name not in names


def test_without_git_it_takes_what_looks_like_code(checkout: Path, tmp_path: Path) -> None:
    before = set(Snapshot(checkout).files)
    (checkout / ".git").rename(tmp_path / "git")
    assert before <= set(Snapshot(checkout).files)


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
    assert (folder / REVISION).read_text().strip() in done.stdout
