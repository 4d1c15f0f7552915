"""A folder that cannot be made is one line on every rank, before anything runs where it shows."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.utils.loop_case import train_tiny
from utils import distributed
from utils.errors import UserError
from utils.folders import check_folder, check_run_folder, make_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("x")
    return path


@pytest.mark.parametrize(("below", "said"), [("", "it is a file"), ("sub/run", "file is a file")])
@pytest.mark.parametrize("refuse", [make_folder, check_folder])
def test_a_file_in_the_way(file: Path, below: str, said: str, refuse) -> None:
    with pytest.raises(UserError) as caught:
        refuse(file / below)
    line = str(caught.value)
    assert line.startswith(f"output_dir: cannot make {file / below}: ") and line.endswith(said)


def test_what_can_be_made_is_made_and_looking_makes_nothing(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    assert make_folder(tmp_path / "a" / "b").is_dir()
    assert make_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"


@pytest.mark.parametrize(
    ("place", "said"), [("/sys/foo", "permitted|denied|Read-only"), ("/proc/foo", "no folders|den")]
)
def test_a_file_system_without_folders(place: str, said: str) -> None:
    if not Path(place).parent.is_dir():
        pytest.skip("not Linux")
    with pytest.raises(UserError, match=f"^output_dir: cannot make {place}: .*({said})"):
        make_folder(place)


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # nothing is barred from root
    with pytest.raises(UserError, match="Permission denied"):
        check_folder(tmp_path / "run")
    # A command that only prints a table may stand in a folder of somebody else.
    check_run_folder({"output_dir": str(tmp_path / "run"), "launcher": {"kind": "here"}})
    with pytest.raises(UserError, match="Permission denied"):
        check_run_folder({"output_dir": str(tmp_path / "run"), "probes": {}})


def test_a_folder_that_is_there_is_not_said_to_be_unmakeable(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    said = f"^output_dir: {tmp_path} is there but cannot be written to: Permission denied$"
    with pytest.raises(UserError, match=said):
        check_folder(tmp_path)


def test_too_long_a_path() -> None:
    with pytest.raises(UserError, match="aaa... is too long: 301 characters"):
        make_folder("/" + "a" * 300)


def test_a_run_in_a_file_is_refused(file: Path) -> None:
    with pytest.raises(UserError, match=f"^output_dir: cannot make {file}: it is a file$"):
        train_tiny(file)


def test_what_the_system_refuses_rank_0_reaches_the_others(monkeypatch) -> None:
    """A rank that is not told waits for the others, and is ended by gloo's error."""
    told: list[object] = []
    monkeypatch.setattr(distributed, "broadcast_object", lambda value: told.append(value) or value)

    def refuse() -> None:
        raise OSError(errno.EIO, "Input/output error", "config.yaml")

    with pytest.raises(OSError, match="config.yaml"):
        distributed.on_main(refuse)
    assert isinstance(told[0], OSError)
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "broadcast_object", lambda value: told[0])
    with pytest.raises(OSError, match="config.yaml"):
        distributed.on_main(refuse)


REFUSED = """
import sys
from tests.utils.loop_case import train_tiny
from utils import distributed
from utils.joining import session
from utils.errors import UserError
with session("cpu"):
    try:
        train_tiny(sys.argv[1])
    except UserError as error:
        with open(f"{sys.argv[1]}.{distributed.rank()}", "w") as told:
            told.write(str(error))
"""


@pytest.mark.slow
def test_every_rank_gets_the_same_line(file: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = file.with_name("refused.py")
    script.write_text(REFUSED)
    done = subprocess.run(
        [*command, "--nproc-per-node=2", str(script), str(file)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = f"output_dir: cannot make {file}: it is a file"
    assert [file.with_name(f"file.{rank}").read_text() for rank in (0, 1)] == [said, said]
