"""What any command says of a mistake that shows late: one line of ours, and nothing of others'."""

import errno
import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from slurm.job import Job
from utils.errors import UserError, as_user_error
from utils.mistakes import mistakes_told
from utils.ranges import check_share
from vit.backbone import take_indices


def test_a_mistake_of_the_user_is_one_line() -> None:
    with pytest.raises(UserError, match=r"\(vit/backbone.py:\d+\)$") as told, mistakes_told():
        take_indices([-9], 4)
    assert "\n" not in str(told.value)


def test_every_command_tells_it() -> None:
    with pytest.raises(UserError, match=r"\(vit/backbone.py:\d+\)$"):
        Job(lambda config: take_indices([config["layer"]], 4), {"layer": -9})()


def test_a_value_out_of_range_is_a_mistake_by_the_name_that_launchers_look_for() -> None:
    said = r"^drop must lie in \[0, 1\], not 2$"
    with pytest.raises(UserError, match=said) as told, mistakes_told():
        check_share("drop", 2)
    assert type(told.value) is UserError


def test_what_code_without_our_errors_says_becomes_one_line() -> None:
    with pytest.raises(UserError, match="^a.pth: two lines$"), as_user_error("a.pth: "):
        raise ValueError("two\n  lines")
    with pytest.raises(UserError, match="^as it is$"), as_user_error("a.pth: "):
        raise UserError("as it is")


def test_a_full_disk_is_one_line() -> None:
    said = "results.json: No space left on device; what was written"
    with pytest.raises(UserError, match=said), mistakes_told():
        raise OSError(errno.ENOSPC, "No space left on device", "results.json")
    with pytest.raises(OSError, match="results.json"), mistakes_told():
        raise OSError(errno.EIO, "Input/output error", "results.json")


def test_an_error_of_other_code_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="Expecting value") as raised, mistakes_told():
        json.loads("x")
    assert not isinstance(raised.value, UserError)


def test_a_path_that_no_file_system_takes_is_a_mistake_and_other_errors_stay(tmp_path) -> None:
    too_long, missing = Path("a" * 300), tmp_path / "none"
    said = "a path of 300 characters is too long: aaa"
    with pytest.raises(UserError, match=said), mistakes_told():
        too_long.read_text()
    with pytest.raises(FileNotFoundError), mistakes_told():
        missing.read_text()


def test_a_file_that_may_not_be_used_is_one_line(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/results.json: Not a directory"), mistakes_told():
        (tmp_path / "file" / "results.json").write_text("x")
    with pytest.raises(UserError, match=": Is a directory"), mistakes_told():
        tmp_path.read_text()


@pytest.mark.parametrize("asked", [True, False])
def test_the_whole_traceback_for_who_asks(asked, monkeypatch, capsys) -> None:
    """A slip in one's own probe or encoder is cut to the line of the file that built it."""
    if asked:
        monkeypatch.setenv("OCTIC_TRACEBACK", "1")
    # A launcher's and the run's own: what it shows, it shows once.
    with pytest.raises(UserError, match="cannot be built"), mistakes_told(), mistakes_told():
        try:
            Fraction(1, 0)
        except ZeroDivisionError as error:
            raise UserError(f"it cannot be built: {error}") from None
    said = capsys.readouterr().err
    assert said.count("Traceback") == int(asked)
    assert ("Fraction(1, 0)" in said and "ZeroDivisionError" in said) == asked


GPU_FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.25 GiB of "
    "which 1.10 GiB is free. Process 4711 has 30.00 GiB memory in use. Including non-PyTorch "
    "memory, this process has 48.15 GiB memory in use. Of the allocated memory 47.20 GiB is "
    "allocated by PyTorch, and 120.00 MiB is reserved by PyTorch but unallocated."
)

CUBLAS_WITHOUT_ROOM = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


def test_too_little_memory_is_one_line_that_says_what_takes_less() -> None:
    with pytest.raises(UserError) as told, mistakes_told():
        raise torch.OutOfMemoryError(GPU_FULL)
    what, _, remedy = str(told.value).partition("; ")
    assert what.startswith("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    assert what.endswith("Process 4711 has 30.00 GiB memory in use") and "accumulation" in remedy
    said = "ALLOC_FAILED when calling .*; smaller batches"
    with pytest.raises(UserError, match=said), mistakes_told():
        raise RuntimeError(CUBLAS_WITHOUT_ROOM)
    said = "can't allocate memory: .* 4611686018427387904 bytes; smaller batches"
    with pytest.raises(UserError, match=said), mistakes_told():
        torch.empty(1 << 62, dtype=torch.uint8)


def test_another_error_of_torch_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied") as raised, mistakes_told():
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not isinstance(raised.value, UserError)


@pytest.mark.parametrize(
    "said",
    [
        "InvalidCxxCompiler: No working C++ compiler found in cpp.cxx: (None, 'g++')",
        "Failed to find C compiler. Please specify via CC environment variable",
    ],
)
def test_a_machine_without_a_compiler_is_one_line(said) -> None:
    with pytest.raises(UserError, match="no compiler .* training.compile=false"), mistakes_told():
        raise RuntimeError(said)
