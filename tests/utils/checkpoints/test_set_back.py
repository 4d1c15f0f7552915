"""Which checkpoint counts where a run was set back, copied, or is still saving an earlier one."""

import json
import shutil
import time

import pytest
import torch

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
    step, _, (note,) = checkpoints.load()
    assert step == 1 and f"{tmp_path / '5'} says it is of step 1" in note


def test_a_save_begins_once_the_earlier_one_is_through(tmp_path, monkeypatch):
    real = shards.save_file
    monkeypatch.setattr(shards, "save_file", lambda *a: time.sleep(0.2) or real(*a))
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.start(step, parts(step))
    assert 1 in checkpoints.steps() and checkpoints.newest == 1
    assert checkpoints.wait() == "" and checkpoints.steps() == [1, 2]


def test_what_a_run_took_and_planned_is_told_when_it_goes_on(tmp_path):
    """The seconds add up over the runs; each plan is its own run's."""
    first = Checkpoints(tmp_path, plan={"total_steps": 100})
    first.seconds_before = 1000.0
    first.save(1, parts(1))
    second = Checkpoints(tmp_path, plan={"total_steps": 50})
    assert (second.seconds_before, second.plan_before, second.newest) == (0.0, {}, None)
    assert second.seconds < 900
    second.load()
    assert 1000 <= second.seconds_before <= second.seconds < 1900
    assert (second.plan_before, second.plan) == ({"total_steps": 100}, {"total_steps": 50})
    assert second.newest == 1
    second.save(2, parts(2))
    third = Checkpoints(tmp_path)
    third.load()
    assert third.plan_before == {"total_steps": 50} and third.seconds_before >= 1000


@pytest.mark.parametrize(
    ("written", "seconds", "plan"),
    [
        ({"seconds": "long", "plan": ["many"]}, 0.0, {}),
        ({"seconds": 7, "plan": {"total_steps": 5, "unit": "step"}}, 7.0, {"total_steps": 5}),
        ({"seconds": None, "plan": None}, 0.0, {}),
    ],
)
def test_what_another_version_noted_of_a_run_is_no_obstacle(tmp_path, written, seconds, plan):
    Checkpoints(tmp_path, plan={"total_steps": 3}).save(1, parts(1))
    path = tmp_path / "1/checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | written))
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load()[0] == 1
    assert (checkpoints.seconds_before, checkpoints.plan_before) == (seconds, plan)


def test_a_step_that_is_not_to_be_replaced_is_written_where_it_is_missing(tmp_path):
    """Whatever other steps there are; the one that stays counts as the newest."""
    Checkpoints(tmp_path).save(1, parts(1))
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.save(2, parts(2), replace=False) == ""
    assert (checkpoints.steps(), checkpoints.newest) == ([1, 2], 2)
    assert value(checkpoints.load()) == 2.0
    checkpoints.save(3, parts(3))
    checkpoints.save(2, parts(22), replace=False)
    assert checkpoints.newest == 2


def test_a_save_that_failed_in_its_last_step_is_no_obstacle_to_the_next(tmp_path, monkeypatch):
    """What it had moved aside lies there still when the step is written again."""

    def fail(*_):
        raise OSError(5, "Input/output error")

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, parts(1))
    with monkeypatch.context() as patch:
        patch.setattr("utils.checkpoints.checkpoint.write_text", fail)
        assert "Input/output error" in checkpoints.save(4, parts(2))
    assert checkpoints.save(4, parts(3)) == "" and value(checkpoints.load()) == 3.0
    assert {path.name for path in tmp_path.iterdir()} == {"4", "last"}


def test_a_part_of_a_tensor_takes_the_room_of_the_part(tmp_path):
    """Not that of the tensor it is cut from."""
    whole = torch.arange(100_000.0)
    part = {"recipe": {"weight": whole[3:5], "again": whole[4:6], "row": whole.view(100, -1)[7]}}
    assert Checkpoints(tmp_path).save(1, part) == ""
    found = Checkpoints(tmp_path).load()[1]["recipe"]
    assert all(torch.equal(found[name], tensor) for name, tensor in part["recipe"].items())
    assert (tmp_path / "1" / SHARD).stat().st_size < 10_000


def test_a_tensor_under_two_names_comes_back_under_both(tmp_path):
    """As the tied weights of a network do."""
    tied = torch.arange(6.0)
    saved = {"recipe": {"first": tied, "second": tied, "third": tied.view(2, 3)}}
    assert Checkpoints(tmp_path).save(1, saved) == ""
    found = Checkpoints(tmp_path).load()[1]["recipe"]
    assert all(torch.equal(found[name], tensor) for name, tensor in saved["recipe"].items())
