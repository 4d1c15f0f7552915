"""The measured errors are zero where the law holds and large where it does not."""

import pytest
import torch

from evaluation.equivariance import layer_errors, turn_errors, worst_error
from octic.vision_transformer import OcticVisionTransformer
from utils.symmetry import SYMMETRIES
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
    errors = turn_errors(net, torch.randn(2, 3, 16, 16).double())
    assert list(errors) == list(SYMMETRIES)
    assert max(error.cls for error in errors.values()) < 1e-12
    assert max(error.patches for error in errors.values()) < 1e-12


def test_plain_net_has_no_layers_and_no_law():
    net = shaken(VisionTransformer(**SIZES))
    images = torch.randn(2, 3, 16, 16).double()
    assert layer_errors(net, images) == {}
    assert worst_error({}) is None
    errors = turn_errors(net, images)
    assert errors["e"].cls == 0
    assert min(errors[name].cls for name in list(errors)[1:]) > 1e-3
