"""The measured errors are zero where the law holds and large where it does not."""

import math

import pytest
import torch

from evaluation.adapters import CallableBackbone
from evaluation.symmetry.equivariance import (
    greatest,
    layer_errors,
    logit_errors,
    measure,
    octic_only,
    relative_error,
    worst_error,
)
from octic.vision_transformer import OcticVisionTransformer
from tests.evaluation.backbones import DEPTH, any_backbone, make
from utils.symmetry import SYMMETRIES
from vit.adapters import timm_backbone
from vit.backbone import Features
from vit.vision_transformer import VisionTransformer

SIZES = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 64,
    "num_heads": 2,
    "depth": 4,
    "num_classes": 0,
}


def shaken(net: torch.nn.Module) -> torch.nn.Module:
    """No parameter stays zero or one, so that no law holds by initialisation alone."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return net.double()


@pytest.mark.parametrize("group", ["D4", "C4", "mirror"])
def test_octic_half_obeys_the_law(group):
    net = shaken(OcticVisionTransformer(**SIZES, group=group, num_register_tokens=2))
    errors = layer_errors(net, torch.randn(2, 3, 16, 16).double())
    assert list(errors) == ["patch_embed", "blocks.0", "blocks.1"]
    assert set(errors["blocks.1"]) == {element.name for element in net.group.elements}
    assert worst_error(errors) < 1e-12


def test_a_broken_layer_shows():
    net = shaken(OcticVisionTransformer(**SIZES))
    net.blocks[1].register_forward_hook(lambda module, args, out: out + 0.01)
    errors = layer_errors(net, torch.randn(2, 3, 16, 16).double())
    assert max(errors["blocks.0"].values()) < 1e-12
    assert max(errors["blocks.1"].values()) > 1e-4


def test_invariant_net_end_to_end():
    net = shaken(OcticVisionTransformer(**SIZES, invariant=True))
    errors = measure(net, torch.randn(2, 3, 16, 16).double()).turns
    assert list(errors) == list(SYMMETRIES)
    assert max(error.cls for error in errors.values()) < 1e-12
    assert max(error.patches for error in errors.values()) < 1e-12


def test_plain_net_has_no_layers_and_no_law():
    net = shaken(VisionTransformer(**SIZES))
    images = torch.randn(2, 3, 16, 16).double()
    assert layer_errors(net, images) == {}
    assert worst_error({}) is None
    errors = measure(net, images).turns
    assert errors["e"].cls == 0
    assert min(errors[name].cls for name in list(errors)[1:]) > 1e-3


@any_backbone
def test_every_layer_of_every_kind_of_net(backbone):
    """Embedding and blocks are found in ours, timm's and torchvision's nets alike."""
    net = shaken(make(backbone))
    layers, turns = measure(net, torch.randn(2, 3, 32, 32).double())
    assert list(layers) == ["patch_embed", *(f"blocks.{index}" for index in range(DEPTH))]
    assert list(turns) == list(SYMMETRIES)
    for layer in layers.values():
        assert list(layer.errors) == list(SYMMETRIES) and layer.errors["e"] == 0
        largest = max(layer.errors.values())
        assert largest < 1e-10 if layer.octic else largest > 1e-3
    is_octic = hasattr(net, "group")
    assert [layer.octic for layer in layers.values()] == [is_octic] * 3 + [False] * 2


def test_plain_blocks_of_an_invariant_net_move_patches_alone():
    net = shaken(OcticVisionTransformer(**SIZES, invariant=True))
    layers, _ = measure(net, torch.randn(2, 3, 16, 16).double())
    assert [layer.octic for layer in layers.values()] == [True, True, True, False, False]
    assert max(max(layer.errors.values()) for layer in layers.values()) < 1e-12


def test_elements_outside_the_group_have_no_error():
    """A mirror net promises nothing of turns, so its octic layers say nothing of them."""
    net = shaken(OcticVisionTransformer(**SIZES, group="mirror"))
    layers, turns = measure(net, torch.randn(2, 3, 16, 16).double())
    errors = layers["blocks.0"].errors
    assert {name for name, error in errors.items() if error is not None} == {"e", "m"}
    assert set(octic_only(layers)["blocks.0"]) == {"e", "m"}
    assert turns["r"].cls > 1e-3


def test_a_net_without_blocks_of_tokens_is_measured_by_its_maps():
    net = timm_backbone("resnet10t").double()
    layers, turns = measure(net, torch.randn(1, 3, 64, 64).double(), elements=["e", "m"])
    assert list(layers) == [f"features.{index}" for index in range(net.depth)]
    assert layers["features.4"].errors["e"] == 0 < layers["features.4"].errors["m"]
    assert turns["m"].cls > 0


def test_a_net_that_gives_its_last_block_only_is_measured_by_it():
    patches = torch.nn.Conv2d(3, 5, 8, 8).double()

    def encode(images):
        found = patches(images).movedim(1, -1)
        return found.mean(dim=(1, 2)), None, found

    net = CallableBackbone(encode, embed_dim=5, patch_size=8)
    layers, turns = measure(net, torch.randn(2, 3, 32, 32).double(), elements=["e", "r"])
    assert list(layers) == ["features.0"]
    assert layers["features.0"].errors["e"] == 0 < layers["features.0"].errors["r"]
    assert turns["r"].patches == layers["features.0"].errors["r"]


class Dropping(torch.nn.Module):
    """Mean colours of patches, of which the second block gets half; no map is left."""

    embed_dim, patch_size = 3, 4

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(2))

    def features(self, images, layers=(-1,)):
        tokens = torch.nn.functional.avg_pool2d(images, 4).flatten(2).movedim(1, 2)
        tokens = self.blocks[1](self.blocks[0](tokens)[:, :8])
        return [Features(tokens.mean(1), None)]


def test_a_net_that_drops_tokens_is_measured_while_it_has_them_all():
    """Layers that see every patch in its own way obey the law; what half of them say does not."""
    layers, turns = measure(Dropping().double(), torch.randn(2, 3, 16, 16).double())
    assert list(layers) == ["patch_embed", "blocks.0"]
    assert max(max(layer.errors.values()) for layer in layers.values()) < 1e-12
    assert turns["rr"].patches is None and turns["rr"].cls > 1e-3


def test_an_error_is_a_distance_in_lengths_of_what_is_expected():
    """So it is the same for a net whose features are a thousand times as large."""
    x = torch.randn(2, 5, 3)
    for scale in (1.0, 1e3):
        assert relative_error(1.5 * scale * x, scale * x) == pytest.approx(0.5)
        assert relative_error(torch.zeros_like(x), scale * x) == pytest.approx(1)
    assert relative_error(0 * x, 0 * x) == 0


def test_logits():
    sizes = {**SIZES, "num_classes": 5}
    images = torch.randn(6, 3, 16, 16).double()
    for error, same in logit_errors(
        shaken(OcticVisionTransformer(**sizes, invariant=True)), images
    ).values():
        assert error < 1e-12 and same == 1
    found = logit_errors(shaken(VisionTransformer(**sizes)), images)
    assert found["e"] == (0, 1) and found["r"][0] > 1e-3


def test_a_nan_is_the_greatest_error_wherever_it_stands():
    """Python's max drops a NaN that does not come first."""
    assert math.isnan(worst_error({"a": {"e": 0.0, "m": math.nan}, "b": {"e": 1.0}}))
    assert greatest([None, 0.0, 2.0]) == 2.0 and greatest([None]) is None
    net = shaken(OcticVisionTransformer(**{**SIZES, "num_classes": 5}, invariant=True))
    net.head.weight.data[0] = math.nan
    found = logit_errors(net, torch.randn(2, 3, 16, 16).double())
    assert all(math.isnan(value) for pair in found.values() for value in pair)
