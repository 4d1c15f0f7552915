"""One process works, the others wait for it: not in silence, and not for ever."""

import errno
from pathlib import Path

import pytest
from filelock import FileLock

from utils import only_one as module
from utils.errors import UserError
from utils.only_one import only_one


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_a_holder_that_hangs_is_told_of_and_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, local_rank: str
) -> None:
    monkeypatch.setattr(module, "TOLD_AFTER_S", 0.05)
    monkeypatch.setattr(module, "GIVEN_UP_AFTER_S", 0.05)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    place = tmp_path / "x.lock"
    with (
        FileLock(place),
        pytest.raises(UserError, match=f"has held {place} .*remove that file"),
        only_one(place),
    ):
        pytest.fail("two at a time")
    told = f"waiting for another process that holds {place}\n" if local_rank == "0" else ""
    assert capsys.readouterr().err == told
    with only_one(place):  # free again
        assert place.exists()
    assert capsys.readouterr().err == ""


def test_what_goes_wrong_inside_frees_it(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), only_one(tmp_path / "x.lock"):
            raise KeyError


def test_a_file_system_without_locks_is_an_error_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(FileLock, "_acquire", missing)
    with pytest.raises(OSError, match="no flock here") as caught, only_one(tmp_path / "x.lock"):
        pytest.fail("not locked")
    assert caught.value.errno == errno.ENOLCK
