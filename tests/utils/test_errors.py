"""Mistakes that any part of the code may stumble over."""

from pathlib import Path

import pytest

from utils.errors import UserError, long_paths_told


def test_a_path_that_no_file_system_takes_is_a_mistake_and_other_errors_stay(tmp_path):
    too_long, missing = Path("a" * 300), tmp_path / "none"
    said = "a path of 300 characters is too long: aaa"
    with pytest.raises(UserError, match=said), long_paths_told():
        too_long.read_text()
    with pytest.raises(FileNotFoundError), long_paths_told():
        missing.read_text()
