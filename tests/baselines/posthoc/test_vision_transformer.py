"""The small ViT: as many parameters as published, at home in timm."""

import pytest
import timm
import torch

from baselines.posthoc.vision_transformer import SmallVisionTransformer


@pytest.mark.parametrize(
    ("name", "size", "parameters"),
    [("posthoc_vit_mnist", 28, 503178), ("posthoc_vit_pcam", 96, 521794)],
)
def test_registered_models_have_the_published_parameters(name, size, parameters):
    net = timm.create_model(name).eval()
    assert sum(p.numel() for p in net.parameters()) == parameters
    x = torch.randn(2, net.in_chans, size, size)
    torch.testing.assert_close(net.get_classifier()(net(x, output_cls=True)), net(x))
    torch.testing.assert_close(net.forward_head(net.forward_features(x)), net(x))
    assert net.pretrained_cfg["input_size"] == (net.in_chans, size, size)


def test_patches_are_flattened_channel_by_channel_row_by_row():
    x = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    net = SmallVisionTransformer(img_size=4, patch_size=2, in_chans=2, num_patches=6)
    patches = net.patches(x)
    assert patches.shape == (1, 6, 8)
    assert torch.equal(patches[0, 1], x[0, :, 0:2, 2:4].flatten())


def test_a_net_of_one_channel_averages_rgb_images():
    """So that the recipes and judges, whose images are RGB, train and judge it."""
    net = timm.create_model("posthoc_vit_mnist").eval()
    grey = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(net(grey.expand(-1, 3, -1, -1)), net(grey))
    with pytest.raises(ValueError, match="for a model of 1 channels"):
        net(torch.randn(1, 2, 28, 28))


def test_fewer_patches_take_the_first_positions_and_more_are_refused():
    net = SmallVisionTransformer(img_size=16, patch_size=4).eval()
    assert net(torch.randn(1, 3, 12, 12)).shape == (1, 10)
    with pytest.raises(ValueError, match="25 patches for a model of 16 positions"):
        net(torch.randn(1, 3, 20, 20))
    with pytest.raises(ValueError, match="not a multiple of the patch size"):
        net(torch.randn(1, 3, 18, 18))
    with pytest.raises(ValueError, match="for a model of 3 channels"):
        net(torch.randn(1, 1, 16, 16))


@pytest.mark.parametrize("name", ["patch_size", "num_heads"])
def test_sizes_are_not_zero(name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number from 1, not 0"):
        SmallVisionTransformer(**{name: 0})


def test_heads_come_and_go():
    net = SmallVisionTransformer(img_size=16, patch_size=4)
    net.reset_classifier(0)
    assert net(torch.randn(2, 3, 16, 16)).shape == (2, 64)
    net.reset_classifier(3)
    assert net(torch.randn(2, 3, 16, 16)).shape == (2, 3)
    features = net.features(torch.randn(2, 3, 16, 16), (0, -1))
    assert features[1].patches.shape == (2, 4, 4, 64) and features[0].cls.shape == (2, 64)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_heads": 3}, "embed_dim 64 is not divisible by num_heads 3"),
        ({"depth": -1}, "depth must be a whole number from 0, not -1"),
        ({"img_size": [28]}, r"img_size must be one side or \(height, width\), not \[28\]"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_in_one_line(options, said):
    with pytest.raises(ValueError, match=said):
        SmallVisionTransformer(**options)
