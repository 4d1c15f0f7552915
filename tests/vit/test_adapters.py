"""Networks of timm say what is asked of a net, whatever timm itself calls it."""

import pytest
import torch

import octic  # noqa: F401  (registers the models)
from utils.flops import multiply_adds
from vit.adapters import TimmBackbone
from vit.export import example_images


@pytest.mark.parametrize(
    "name", ["resnet18", "vit_tiny_patch16_224", "fastvit_t8", "hybrid_deit_small_patch16"]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_adapter_knows_the_channels_of_its_images(name: str, channels: int) -> None:
    with torch.device("meta"):
        net = TimmBackbone(name, in_chans=channels)
    assert net.in_chans == channels
    net(torch.empty(1, net.in_chans, 224, 224, device="meta"))
    assert example_images(net, 224, batch=2).shape == (2, channels, 224, 224)
    for call in (net, net.features):
        with pytest.raises(ValueError, match=f"for a model of {channels} channels"):
            call(torch.empty(1, 4 - channels, 224, 224, device="meta"))


def test_a_net_of_grey_images_costs_less() -> None:
    """By the other two channels of its first convolution: 7 x 7, 64 maps of 112 x 112."""
    with torch.device("meta"):
        grey, coloured = (multiply_adds(TimmBackbone("resnet18", in_chans=n), 224) for n in (1, 3))
    assert coloured - grey == 2 * 7 * 7 * 64 * 112 * 112
