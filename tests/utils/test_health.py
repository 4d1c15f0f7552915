"""What is not finite leaves no trace: buffers are put back, broken weights make no checkpoint."""

import math
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.utils.loop_case import train_tiny, train_together
from utils.checkpoints.checkpoint import Checkpoints
from utils.errors import UserError
from utils.health import Health

NAN = math.nan


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr("utils.metrics.draw_curves", lambda path: None)


class Counting(nn.Module):
    """Changes one buffer in place, replaces another, makes a third."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("later", None)

    def forward(self, x):
        self.seen = self.seen + len(x)
        self.later = torch.ones(2)
        return self.norm(x)


def test_a_step_is_undone_whatever_it_did_to_the_buffers(monkeypatch):
    net, health = Counting(), Health()
    for _ in range(2):
        health.remember(net)
        net(torch.randn(4, 3))
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    monkeypatch.setattr(nn.Module, "named_modules", None)  # the modules are walked once
    health.remember(net)
    net(torch.full((4, 3), torch.nan))
    assert net.norm.running_mean.isnan().all() and net.seen == 12
    health.undo()
    monkeypatch.undo()
    assert dict(net.named_buffers()).keys() == before.keys()
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    other = Counting()
    health.remember(other)
    other(torch.randn(4, 3))
    health.undo()
    assert other.seen == 0 and net.seen == 8


def steps_in(folder: Path) -> list[int]:
    return Checkpoints(folder / "checkpoints").steps()


def test_bad_steps_that_are_not_in_a_row_end_nothing(tmp_path):
    summary, _ = train_tiny(tmp_path, recipe={"poison": (3, 5, 9)})
    assert summary["finished"] and summary["skipped_steps"] == 3


def test_weights_broken_by_a_finite_step_make_no_checkpoint(tmp_path):
    train_tiny(tmp_path, max_steps=4)
    expected = (
        r"not finite at step 6, 7 \(loss=nan.*: stopped; the weights of step 5 are not finite, "
        r"so they make no checkpoint; the last sound one is .*checkpoints/4$"
    )
    with pytest.raises(UserError, match=expected):
        train_tiny(tmp_path, recipe={"breaks": (4, NAN)})
    assert steps_in(tmp_path) == [4]
    summary, _ = train_tiny(tmp_path)
    assert summary["finished"] and summary["skipped_steps"] == 0


def test_without_any_sound_checkpoint_it_says_so(tmp_path):
    with pytest.raises(UserError, match="step 5 are not finite.*; there is no sound one$"):
        train_tiny(tmp_path, recipe={"breaks": (4, NAN)})
    assert steps_in(tmp_path) == []


def test_broken_weights_do_not_take_the_place_of_sound_ones(tmp_path, capsys):
    """They are looked at before a period saves them: one checkpoint that is kept is enough."""
    with pytest.raises(UserError, match=r"the last sound one is .*checkpoints/4$"):
        train_tiny(tmp_path, recipe={"breaks": (4, NAN)}, every=1, keep_last=1)
    assert steps_in(tmp_path) == [4]
    out = capsys.readouterr().out
    assert "\nthe weights of step 5 are not finite, so they make no checkpoint\n" in out


def test_weights_that_the_last_step_breaks_end_the_run_in_one_line(tmp_path):
    expected = r"^the weights of step 5 are not finite, so .*; the last sound one is .*/3$"
    train_tiny(tmp_path, max_steps=3)
    [exported] = (tmp_path / "exported").iterdir()
    before = exported.read_bytes()
    with pytest.raises(UserError, match=expected):
        train_tiny(tmp_path, recipe={"breaks": (4, NAN)}, max_steps=5)
    assert exported.read_bytes() == before


def test_checkpoints_of_broken_weights_are_passed_over(tmp_path, capsys, monkeypatch):
    """A folder of an earlier version may hold such."""
    monkeypatch.setattr("utils.training.broken_weights", lambda recipe, step: "")
    with pytest.raises(UserError, match=r"the last sound one is .*checkpoints/4$"):
        train_tiny(tmp_path, recipe={"breaks": (4, NAN)}, every=1)
    assert steps_in(tmp_path) == [4, 5, 6]
    shutil.rmtree(tmp_path / "checkpoints/6")
    (tmp_path / "checkpoints/last").write_text("5\n")
    capsys.readouterr()
    summary, _ = train_tiny(tmp_path)
    told = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert len(told) == 1 and told[0].endswith("; resuming from step 4")
    assert "checkpoints/5 holds weights that are not finite (student.blocks.1.weight)" in told[0]
    assert summary["finished"]


def test_running_statistics_may_be_infinite(tmp_path):
    """The weights are what is looked at: a buffer may mean something by it."""
    parts = {"recipe": {"weight": torch.ones(3), "mask": torch.full((3,), -math.inf)}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, parts)
    assert checkpoints.soundest(["weight"]) == (1, [])
    assert checkpoints.soundest(["weight", "mask"])[0] is None


@pytest.mark.parametrize("sharding", ["replicate", "shard"])
def test_every_rank_decides_alike(tmp_path, sharding):
    """The broken part is on the last rank alone."""
    options = {"sharding": sharding, "recipe": {"dropout": 0.0}}
    broken = {**options, "recipe": {"dropout": 0.0, "breaks": (4, NAN)}}
    with pytest.raises(AssertionError, match=r"the last sound one is .*checkpoints/3"):
        train_together(2, [(str(tmp_path), {**options, "max_steps": 3}), (str(tmp_path), broken)])
    assert steps_in(tmp_path) == [3]


class Doubling(nn.Module):
    """A net with features, which huge weights make infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def features(self, images):
        tokens = images.flatten(1)[:, :4] * self.weight * self.weight
        return [namedtuple("Features", "cls")(tokens)]


class Kept:
    """Checkpoints of which step 3 is sound."""

    def wait(self) -> str:
        return ""

    def path(self, step: int) -> str:
        return f"checkpoints/{step}"

    def soundest(self, names: list[str]) -> tuple[int, str]:
        return 3, ""


def give_up(health: Health, net: nn.Module) -> tuple[str, list[int]]:
    """What is said of the state from before the bad steps, and which step is saved."""
    saved: list[int] = []
    said = str(health.give_up(net, Kept(), saved.append))
    return said.partition(": stopped; ")[2], saved


def test_huge_weights_are_as_lost_as_infinite_ones():
    net, health = Doubling(), Health()
    health.bad_steps = [(6, {"loss": NAN})]
    images = torch.rand(8, 3, 4, 4)
    health.features.examine(net, images)
    assert give_up(health, net) == ("the state from before them is in checkpoints/5", [5])
    with torch.no_grad():
        net.weight.fill_(1e30)
    health.features.examine(net, images)
    assert health.features.alarm == "ALARM: the features are not finite"
    fate, saved = give_up(health, net)
    assert fate.startswith("the weights of step 5 give features that are not") and not saved
    assert fate.endswith("the last sound one is checkpoints/3")


def test_images_that_are_not_finite_say_nothing_of_the_weights():
    net, health = Doubling(), Health()
    health.bad_steps = [(6, {"loss": NAN})]
    health.features.examine(net, torch.full((8, 3, 4, 4), NAN))
    assert health.features.alarm == "ALARM: the images are not finite"
    assert give_up(health, net) == ("the state from before them is in checkpoints/5", [5])
