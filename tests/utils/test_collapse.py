"""Features that collapse are told of, whatever net and batch; those that do not are not."""

import math
from collections import namedtuple

import pytest
import torch
from torch import nn

from utils.collapse import FeatureWatch, effective_rank, relative_std


def test_effective_rank_and_spread():
    torch.manual_seed(0)
    assert effective_rank(torch.randn(2000, 8)) == pytest.approx(8, abs=0.1)
    line = torch.randn(50, 1) @ torch.randn(1, 8) + 5
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.ones(5, 3)) == 0.0
    assert relative_std(torch.ones(5, 3)) == 0.0
    assert relative_std(torch.randn(5000, 3)) == pytest.approx(1, abs=0.01)


class Showing(nn.Module):
    """Features that are the first values of an image."""

    def features(self, images):
        return [namedtuple("Features", "cls")(images.flatten(1)[:, :4])]


class Backbone(nn.Module):
    """Features of a given spread around one point."""

    def __init__(self, spread):
        super().__init__()
        self.spread = spread

    def features(self, images, layers=(-1,)):
        assert not self.training

        class Features:
            cls = torch.ones(len(images), 4) + self.spread * torch.randn(len(images), 4)

        return [Features]


def test_collapse_raises_an_alarm_and_health_does_not():
    watch = FeatureWatch()
    small, large = torch.zeros(8, 3, 8, 8), torch.zeros(32, 3, 16, 16)
    batch = {"crops": [small, large], "masks": torch.zeros(32, 4, dtype=torch.bool)}
    before = torch.get_rng_state()
    values = watch.examine(Backbone(1.0).train(), batch)
    assert values["feature_rank"] > 2 and watch.alarm == ""
    assert torch.equal(before, torch.get_rng_state())
    watch.examine(Backbone(1e-6), batch)
    assert "collapsed" in watch.alarm and "\n" not in watch.alarm
    assert watch.examine(nn.Linear(2, 2), batch) == {}
    assert watch.examine(Backbone(1.0), {"x": torch.zeros(3)}) == {}


@pytest.mark.parametrize("count", [1, 2])
def test_one_image_or_two_cannot_tell_of_a_collapse(count):
    """Their rank is 1 at most: no alarm, no NaN, and three images of the same net are judged."""
    watch, images = FeatureWatch(), torch.randn(3, 3, 4, 4)
    assert watch.examine(Showing(), images[:count]) == {} and watch.alarm == ""
    shown = watch.examine(Showing(), images)
    assert shown["feature_rank"] > 1 and all(map(math.isfinite, shown.values()))


@pytest.mark.parametrize(
    "found", [torch.ones(8, 4), [], [torch.ones(8, 4)], [(torch.ones(8, 4), None)]], ids=str
)
def test_features_of_another_kind_end_no_training(found):
    """torchvision's VGG has `features` too; that they are none of ours is for probes to say."""
    net, watch = Showing(), FeatureWatch()
    for features in (lambda images: found, 64):
        net.features = features
        assert watch.examine(net, torch.randn(8, 3, 4, 4)) == {} and watch.alarm == ""


@pytest.mark.parametrize("wrap", [list, tuple, lambda views: {"crops": views, "step": 3}])
def test_the_largest_images_of_a_batch_are_examined_whatever_it_is(wrap):
    """Of crops of several sizes; masks and labels beside them are no images."""
    seen = []

    class Seeing(Showing):
        def features(self, images):
            seen.append(images)
            return super().features(images)

    small, large = torch.randn(6, 3, 2, 2), torch.randn(4, 3, 4, 4)
    masks = torch.ones(4, 1, 8, 8, dtype=torch.bool)
    assert FeatureWatch().examine(Seeing(), wrap([small, large, masks, torch.zeros(4)]))
    assert len(seen) == 1 and torch.equal(seen[0], large)
    assert FeatureWatch().examine(Seeing(), wrap([masks])) == {} and len(seen) == 1
