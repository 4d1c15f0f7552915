"""A net whose sharded weights reach a rank in bfloat16 is judged in it, whatever is asked."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from evaluation.features.dataset import autocast_of, evaluating
from evaluation.probes.training import FrozenFeatures
from vit.backbone import Features


class Coarse(nn.Module):
    """One convolution, as `utils.parallel` leaves it on a rank."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2).to(torch.bfloat16)
        self.travels_in = torch.bfloat16

    def features(self, images, layers=(-1,)):
        maps = self.conv(images)
        return [Features(cls=maps.mean((2, 3)), patches=maps.permute(0, 2, 3, 1))]


def test_a_probe_in_float32_takes_the_weights_as_they_travel(caplog):
    net, images = Coarse(), torch.randn(2, 3, 4, 4)
    with pytest.raises(RuntimeError):
        net.features(images)
    with evaluating(net, "fp32"):
        assert net.features(images)[0].patches.isfinite().all()
    assert FrozenFeatures(net, (-1,), "fp32")(images)[0].patches.isfinite().all()
    assert "judged in torch.bfloat16" in caplog.text


def test_others_keep_what_was_asked_for():
    assert autocast_of(SimpleNamespace(), "fp32") is None
    assert autocast_of(SimpleNamespace(travels_in=None), "bf16") is torch.bfloat16
    assert autocast_of(SimpleNamespace(travels_in=torch.bfloat16), "fp16") is torch.float16
