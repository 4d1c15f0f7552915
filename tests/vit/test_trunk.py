"""What recipes and tools rely on in every network: hidden patches, encoded parts, fresh heads."""

from typing import Any

import pytest
import torch
from torch import nn

from octic.vision_transformer import OcticVisionTransformer
from vit.vision_transformer import VisionTransformer

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4}
SIZES |= {"num_heads": 2, "num_classes": 5, "init_values": 0.5}
SIZES |= {"mask_token": True, "num_register_tokens": 2}
NETS = {
    "plain": lambda: VisionTransformer(**SIZES, class_position=True),
    "hybrid": lambda: OcticVisionTransformer(**SIZES),
    "invariant": lambda: OcticVisionTransformer(**SIZES, invariant=True),
    "invariant head": lambda: OcticVisionTransformer(**SIZES, invariant_at="head"),
}
kinds = pytest.mark.parametrize("kind", NETS)


def make(kind: str) -> Any:
    net = NETS[kind]().double().eval()
    for parameter in net.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return net


def make_crops() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Large and small crops, and which patches of the large ones are hidden."""
    crops = [torch.randn(count, 3, side, side).double() for count, side in ((2, 32), (3, 16))]
    return crops, torch.rand(2, 64) < 0.4


@kinds
@pytest.mark.parametrize("shape", [(2, 63), (2, 16), (1, 64), (64,), (2, 8, 8)])
def test_masks_of_another_shape_are_refused_by_name(kind, shape):
    """Also those that would be broadcast: each image has patches of its own to hide."""
    crops, _ = make_crops()
    masks = torch.zeros(shape, dtype=torch.bool)
    with pytest.raises(ValueError) as told:
        make(kind).encode(crops, [masks, None])
    assert str(told.value) == f"masks of shape {shape} for 2 images of 8 x 8 patches"


@kinds
def test_what_hidden_patches_show_does_not_count(kind):
    net, (crops, masks) = make(kind), make_crops()
    hidden = masks.view(2, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.randn_like(crops[0])
    before = net.encode(crops, [masks, None])[0]
    unseen = net.encode([torch.where(hidden, other, crops[0]), crops[1]], [masks, None])[0]
    torch.testing.assert_close(unseen, before)
    seen = net.encode([torch.where(hidden, crops[0], other), crops[1]], [masks, None])[0]
    assert not torch.allclose(seen.cls, before.cls)
    # With all patches hidden, their places are what tells them apart.
    (places,) = net.encode(crops[:1], [torch.ones_like(masks)])
    assert not torch.allclose(places.patches[:, 0], places.patches[:, 9])
    torch.testing.assert_close(places.patches[0], places.patches[1])


@kinds
def test_encoded_parts_are_all_tokens_before_and_after_the_norm(kind):
    net, (crops, masks) = make(kind), make_crops()
    packed = net.encode(crops, [masks, None])
    alone = [*net.encode(crops[:1], [masks]), *net.encode(crops[1:])]
    for crop, mask, *encodings in zip(crops, (masks, None), packed, alone, strict=True):
        tokens = net.forward_features(crop, mask)
        for encoded in encodings:
            parts = torch.cat([encoded.cls[:, None], encoded.registers, encoded.patches], dim=1)
            assert encoded.registers.shape[1] == 2
            torch.testing.assert_close(parts, tokens)
            torch.testing.assert_close(net.norm(encoded.prenorm), tokens)


@kinds
def test_a_head_that_is_reset_starts_as_a_new_one(kind):
    net = make(kind)
    net.reset_classifier(200)
    assert net.head.weight.dtype == torch.float64
    assert net.head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not net.head.bias.any()


@kinds
@pytest.mark.parametrize("prune_norm", [False, True])
def test_pruning_leaves_out_what_no_asked_block_needs(kind, prune_norm):
    net, (crops, _) = make(kind), make_crops()
    expected = net.forward_intermediates(crops[0], [0, 2], intermediates_only=True)
    assert net.prune_intermediate_layers([0, 2], prune_norm=prune_norm) == [0, 2]
    assert isinstance(net.norm, nn.Identity) == prune_norm
    assert isinstance(net.get_classifier(), nn.Identity) and len(net.blocks) == 3
    found = net.forward_intermediates(crops[0], [0, 2], intermediates_only=True)
    torch.testing.assert_close(found, expected)


@kinds
def test_features_of_a_block_do_not_depend_on_what_else_is_asked_for(kind):
    """Before, at and behind the switch: the block's tokens, in the plain half's basis, normed."""
    net, (crops, _) = make(kind), make_crops()
    together = net.features(crops[0], range(net.depth))
    x, switched = net.embed(crops[0]), False
    for index, block in enumerate(net.blocks):
        if index == net.switch:
            x, switched = net.transition(x), True
        x = block(x)
        expected = net.norm(x if switched else net.transition(x))
        for found in (together[index], *net.features(crops[0], [index])):
            torch.testing.assert_close(found.cls, expected[:, 0])
            torch.testing.assert_close(found.patches.flatten(1, 2), expected[:, 3:])


def test_tokens_are_pooled_as_asked_and_not_as_nobody_can():
    """The class token; the mean of the patches; all as they are."""
    net, x = make("plain"), torch.randn(2, 3 + 64, 32).double()
    assert torch.equal(net.pool(x), x[:, 0])
    torch.testing.assert_close(net.pool(x, "avg"), x[:, 3:].mean(1))
    assert net.pool(x, "") is x
    with pytest.raises(ValueError, match="unknown global_pool 'max'; known: 'token', 'avg', ''"):
        net.pool(x, "max")


def test_an_image_size_is_one_side_or_two():
    for size in ((32,), [32, 32, 32]):
        with pytest.raises(ValueError, match=r"img_size must be one side or \(height, width\)"):
            VisionTransformer(**SIZES | {"img_size": size})
    assert VisionTransformer(**SIZES | {"img_size": [16, 32]}).grid_size == (4, 8)
