"""Mistakes that any part of the code may stumble over."""

from pathlib import Path

import pytest

from utils.errors import UserError, long_paths_told


def test_a_path_that_no_file_system_takes_is_a_mistake_and_other_errors_stay(tmp_path):
    with pytest.raises(UserError, match="a path of 300 characters is too long: aaa"):
        with long_paths_told():
            Path("a" * 300).open()
    with pytest.raises(FileNotFoundError), long_paths_told():
        (tmp_path / "none").open()
