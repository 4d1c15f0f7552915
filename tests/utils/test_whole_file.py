"""A file appears when all of it is written, and what fails leaves the earlier one."""

import errno
import os
from pathlib import Path

import pytest

from utils.whole_file import whole_file, write_text


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    file, umask = tmp_path / "table.npy", os.umask(0o022)
    try:
        with whole_file(file) as partial:
            partial.write_text("old")
            assert not file.exists()
        with pytest.raises(OSError), whole_file(file) as partial:
            partial.write_text("ne")
            raise OSError("the disk is full")
    finally:
        os.umask(umask)
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "old"
    assert file.stat().st_mode & 0o777 == 0o644  # for who shares the folder, too


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_syncs_no_folders_takes_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    synced = []

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        synced.append(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "last", "5\n")
    assert len(synced) == 1 and [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_file_that_the_disk_did_not_take_does_not_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the sync, not before it: a crash of the machine would leave an empty file."""

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "last"
    write_text(path, "5\n")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_text(path, "6\n")
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "5\n"


def test_an_error_of_the_disk_names_the_file_and_another_what_it_named(tmp_path: Path) -> None:
    """A full disk names none, and the temporary file is gone when a user looks for it."""
    path = tmp_path / "state.json"
    with pytest.raises(OSError) as caught, whole_file(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(path)
    with pytest.raises(IsADirectoryError) as caught, whole_file(path) as partial:
        partial.mkdir()
        partial.write_text("")
    assert caught.value.filename == str(path)
    partial.rmdir()
    with pytest.raises(FileNotFoundError) as caught, whole_file(path):
        (tmp_path / "image.png").read_bytes()
    assert caught.value.filename == str(tmp_path / "image.png")
