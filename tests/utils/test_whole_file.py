"""A file appears when all of it is written, and what fails leaves the earlier one."""

import os
from pathlib import Path

import pytest

from utils.whole_file import whole_file


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
