"""An exported network is whole or not there, says what it is, and is read by whoever may."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from utils.checkpoints.weights_file import export_weights
from utils.errors import UserError


def test_exported_weights_carry_their_metadata(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    path = tmp_path / "exported" / "net.safetensors"
    export_weights(path, {"a": shared.T, "b": shared[0]}, {"constructor": "{}"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"constructor": "{}"}
        assert torch.equal(file.get_tensor("a"), shared.T)
    assert [p.name for p in path.parent.iterdir()] == ["net.safetensors"]


def test_whoever_may_read_the_run_folder_may_read_its_weights(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    export_weights(tmp_path / "x.safetensors", {"a": torch.ones(2)}, {})
    modes = [(tmp_path / name).stat().st_mode for name in ("usual", "x.safetensors")]
    assert modes[0] == modes[1]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "exported").write_text("a file")
    path = tmp_path / "exported" / "net.safetensors"
    with pytest.raises(UserError, match=rf"^{path} not written \(File exists\)$"):
        export_weights(path, {"a": torch.ones(2)}, {})


def test_a_disk_that_fails_at_the_end_leaves_the_earlier_file(tmp_path: Path, monkeypatch) -> None:
    """A network file system may tell of a full disk no sooner than at the sync."""

    def full(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    path = tmp_path / "net.safetensors"
    export_weights(path, {"a": torch.ones(2)}, {})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"net.safetensors not written \(Disk quota exceeded\)$"):
        export_weights(path, {"a": torch.zeros(2)}, {})
    assert list(tmp_path.iterdir()) == [path] and load_file(path)["a"].tolist() == [1, 1]
