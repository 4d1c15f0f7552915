"""The plain ViT equals timm's, resamples as DINOv2, and serves the Backbone contract."""

import pytest
import timm
import torch

import octic  # noqa: F401  (registers the models)
from vit.adapters import TimmBackbone
from vit.backbone import Backbone
from vit.vision_transformer import VisionTransformer, resample_grid

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}


def test_equals_timm_deit3() -> None:
    """timm's DeiT III weights give the same logits."""
    theirs = timm.create_model("deit3_small_patch16_224", num_classes=7, **SMALL).eval()
    ours = timm.create_model("deit_small_patch16_LS", num_classes=7, **SMALL).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_resampling_with_an_offset() -> None:
    """The offset moves the sampling points, not the size; without it the corners stay."""
    grid = torch.randn(1, 6, 6, 4)
    plain, shifted = (resample_grid(grid, (9, 3), offset=offset) for offset in (0.0, 0.1))
    assert plain.shape == shifted.shape == (1, 9, 3, 4)
    assert not torch.equal(plain, shifted)


@pytest.mark.parametrize(
    "name",
    ("vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224", "resnet10t", "vit_medium_patch16_gap_240"),
)
def test_timm_networks_serve_the_contract(name: str) -> None:
    """Class token and a grid of patches, at an oblong size where the network takes one."""
    size = (224, 224) if "r_s16" in name else (64, 96)
    net = TimmBackbone(name).eval()
    assert isinstance(net, Backbone)
    (features,) = net.features(torch.randn(1, 3, *size))
    grid = tuple(side // net.patch_size for side in size)
    assert features.cls.shape == (1, net.embed_dim)
    assert features.patches.shape == (1, *grid, net.embed_dim)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_vit_relpos", 160),
        ("vit_srelpos_small_patch16_224", 224),
        ("cait_xxs24_224", 224),
        ("convit_tiny", 224),
        ("xcit_nano_12_p16_224", 64),
        ("hiera_tiny_224", 224),
        ("hieradet_small", 64),
        ("efficientnet_b0", 64),
        ("crossvit_tiny_240", 240),
        ("samvit_base_patch16", 1024),
    ],
)
def test_timm_networks_are_asked_only_what_they_know(name: str, size: int) -> None:
    """No option that a network has not; the width is that of its features."""
    with torch.device("meta"):
        net = TimmBackbone(name).eval()
        (features,) = net.features(torch.empty(2, 3, size, size))
    side = size // net.patch_size
    assert features.cls.shape == (2, net.embed_dim)
    if name != "crossvit_tiny_240":  # it resizes its images
        assert features.patches.shape == (2, side, side, net.embed_dim)


@pytest.mark.parametrize("name", ("test_vit", "resnet10t", "deit_small_patch16_LS"))
def test_features_come_as_they_are_asked_for(name: str) -> None:
    """In any order, twice too, of timm's networks and of ours in their adapter."""
    own = SMALL if name.endswith("_LS") else {}
    net = TimmBackbone(name, **own).eval()
    x = torch.randn(1, 3, 64, 64)
    asked = net.features(x, (-1, 0, -1))
    for entry, index in zip(asked, (-1, 0, -1), strict=True):
        torch.testing.assert_close(entry, net.features(x, (index,))[0])


def test_without_a_class_token_the_patches_stand_for_it() -> None:
    """Registers are no patches, and no class token."""
    options = {"class_token": False, "num_register_tokens": 2, "global_pool": "avg"}
    net, x = VisionTransformer(**SMALL, num_classes=0, **options).eval(), torch.randn(2, 3, 32, 32)
    (features,) = net.features(x)
    torch.testing.assert_close(features.cls, features.patches.mean(dim=(1, 2)))
    torch.testing.assert_close(features.cls, net(x))
    with pytest.raises(ValueError, match="return_class_token=True needs .* class_token=True"):
        net.get_intermediate_layers(x, return_class_token=True)
    assert net.get_intermediate_layers(x)[0].shape == (2, 16, 48)


def test_timm_features_are_normalised() -> None:
    """The class token is the one that timm's own head reads."""
    net = TimmBackbone("vit_tiny_patch16_224").eval()
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(net.features(x)[0].cls, net.net.forward_features(x)[:, 0])
    with pytest.raises(ValueError, match="timm has no model"):
        TimmBackbone("vit_tinny_patch16_224")


def test_gradient_checkpointing_changes_nothing() -> None:
    """The same gradients, recomputed."""
    net = VisionTransformer(**SMALL, num_classes=3)
    x = torch.randn(2, 3, 32, 32)
    net(x).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net.set_grad_checkpointing()
    net(x).square().sum().backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize(
    "sizes",
    [
        {"patch_size": (8, 8)},
        {"patch_size": 0},
        {"img_size": "32"},
        {"img_size": 0},
        {"in_chans": 0},
        {"embed_dim": 64.0},
        {"depth": 0},
        {"num_classes": -1},
        {"num_register_tokens": -1},
    ],
    ids=str,
)
def test_sizes_without_a_meaning_are_one_line(sizes):
    [key] = sizes
    with pytest.raises(ValueError, match=f"^{key} must be a whole number of at least [01], not "):
        VisionTransformer(**{"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, **sizes})
