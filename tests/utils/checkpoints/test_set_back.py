"""Which checkpoint counts where a run was set back, copied, or is still saving an earlier one."""

import shutil
import time

from tests.utils.checkpoints.test_checkpoint import SHARD, damage, parts, value
from utils.checkpoints import shards
from utils.checkpoints.checkpoint import Checkpoints


def test_a_run_that_was_set_back_keeps_what_it_writes(tmp_path):
    """What lies ahead of it counts for nothing, unless all else is damaged."""
    for step in (1, 2, 3):
        Checkpoints(tmp_path).save(step, parts(step))
    (tmp_path / "last").write_text("1\n")
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    assert checkpoints.load()[0] == 1
    checkpoints.save(2, parts(22))
    assert checkpoints.steps() == [2, 3] and value(checkpoints.load()) == 22.0
    damage(tmp_path / "2", "flip")
    assert checkpoints.load()[0] == 3


def test_what_a_node_wrote_to_a_disk_of_its_own_is_no_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, parts(1))
    monkeypatch.setattr(shards, "hash_file", lambda path: path.unlink() or "0" * 64)
    problem = checkpoints.save(2, parts(2))
    assert f"{SHARD} is not here: do all nodes share {tmp_path}?" in problem
    assert (checkpoints.steps(), checkpoints.newest) == ([1], 1)


def test_a_copy_under_another_step_is_not_taken_for_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, parts(1))
    shutil.copytree(tmp_path / "1", tmp_path / "5")
    (tmp_path / "last").write_text("5\n")
    step, _, _, (note,) = checkpoints.load()
    assert step == 1 and f"{tmp_path / '5'} says it is of step 1" in note


def test_a_save_begins_once_the_earlier_one_is_through(tmp_path, monkeypatch):
    real = shards.save_file
    monkeypatch.setattr(shards, "save_file", lambda *a: time.sleep(0.2) or real(*a))
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.start(step, parts(step))
    assert 1 in checkpoints.steps() and checkpoints.newest == 1
    assert checkpoints.wait() == "" and checkpoints.steps() == [1, 2]
