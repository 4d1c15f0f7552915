"""The probe stays within 8 GiB at the size of ADE20K, and the model is what the code needs."""

import sys

import pytest

from evaluation.segmentation import memory
from evaluation.segmentation.memory import Plan, measure, peak, phases, stays

ADE20K = Plan(patches=3_565_044, queries=396_116, dim=1280)


def test_ade20k_stays_below_8_gib():
    """Room for Python, torch and what the model does not see is left."""
    highest, phase = peak(ADE20K)
    assert phase == "knn" and highest < 6 * 2**30


def test_nothing_grows_with_patches_times_width():
    """Twice the training patches cost their labels alone."""
    twice = ADE20K._replace(patches=2 * ADE20K.patches)
    assert phases(twice) == phases(ADE20K)
    assert sum(stays(twice).values()) - sum(stays(ADE20K).values()) == 258 * ADE20K.patches


def test_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory", "--patches", "1000", "--queries", "10"])
    memory.main()
    assert "1,000 training patches, 10 queries, width 1280" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    words = ["--measure", "--scratch-dir", str(tmp_path / "file" / "below")]
    monkeypatch.setattr(sys, "argv", ["memory", *words])
    with pytest.raises(SystemExit) as left:
        memory.main()
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.startswith("error: --scratch-dir: cannot make")
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_features_do_not_stay_in_memory(tmp_path):
    """Every phase needs far less than the features of 0.4 GB, and no file stays."""
    plan = Plan(200_000, 500, 512, chunk_size=2048)
    kept = sum(stays(plan).values())
    expected = {name: kept + sum(parts.values()) for name, parts in phases(plan).items()}
    found = measure(plan, tmp_path)
    for phase, count in expected.items():
        assert found[phase]["bytes"] < min(count + 150e6, 0.4e9), phase
    assert list(tmp_path.iterdir()) == []
