"""Attention read from the call of torch is what a net computes with, and turns with the image."""

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from baselines.dhvt import DHVT
from baselines.gevit.models import gevit_rotmnist_z2
from baselines.token_reduction.ats import AdaptiveSampling
from baselines.token_reduction.evit import EViT
from baselines.token_reduction.reduced import Reduced
from baselines.token_reduction.smyrf import Smyrf
from baselines.token_reduction.tome import ToMe
from evaluation.pictures.attention import (
    AttentionRecorder,
    attention_maps,
    attention_rollout,
    draw_attention,
)
from octic.vision_transformer import OcticVisionTransformer
from tests.evaluation.backbones import DEPTH, any_backbone, make
from utils.errors import UserError
from vit.adapters import timm_backbone
from vit.vision_transformer import VisionTransformer

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2}


def shaken(net: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return net.double().eval()


@any_backbone
def test_maps_of_every_kind_of_net(backbone):
    """One map per head; all weights together are those of one softmax."""
    net = make(backbone)
    for block in (0, DEPTH - 1, -1):
        maps = attention_maps(net, IMAGES, block=block)
        assert maps.shape == (2, 2, 4, 4) and (maps >= 0).all()
        assert (maps.mean(dim=(2, 3)) <= 17 / 16 + 1e-5).all(), "the class token takes the rest"
    assert attention_maps(net, IMAGES, query="patches").shape == (2, 2, 4, 4)
    assert attention_rollout(net, IMAGES).shape == (2, 1, 4, 4)
    torch.testing.assert_close(attention_maps(net, IMAGES, block=-1), maps)


@any_backbone
def test_features_are_unharmed_by_the_recording(backbone):
    net = make(backbone)
    with torch.no_grad():
        expected = net.features(IMAGES)[0].cls
        with AttentionRecorder(slice(None)) as recorder:
            found = net.features(IMAGES)[0].cls
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert len(recorder.weights) == DEPTH
    for weights in recorder.weights:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 2, 17), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_masks_and_biases_count(kind):
    """The weights recorded give the output of torch's own attention."""
    q, k, v = torch.randn(3, 1, 2, 5, 4).double()
    mask = torch.rand(5, 5) > 0.3 if kind == "bool" else torch.randn(1, 2, 5, 5).double()
    if kind == "bool":
        mask.fill_diagonal_(True)
    with AttentionRecorder(slice(None)) as recorder:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.7)
    torch.testing.assert_close(recorder.weights[0] @ v, out)


def test_last_block_by_hand():
    """Queries and keys of a plain block, written out."""
    net = shaken(VisionTransformer(**SIZES, num_classes=0))
    images = IMAGES.double()
    with torch.no_grad():
        tokens = net.embed(images)
        for block in net.blocks[:-1]:
            tokens = block(tokens)
        last = net.blocks[-1]
        q, k, _ = last.attn.qkv(last.norm1(tokens)).unflatten(-1, (3, 2, 32)).unbind(2)
        weights = (torch.einsum("bhk,bthk->bht", q[:, 0], k) / 32**0.5).softmax(dim=-1)
    maps = attention_maps(net, images)
    torch.testing.assert_close(maps, 17 * weights[..., 1:].unflatten(-1, (4, 4)))


@pytest.mark.parametrize("element", [(1, False), (0, True), (3, True)])
@pytest.mark.parametrize("query", ["class", "patches"])
def test_maps_turn_with_the_image(element, query):
    """In every block of an invariant net, and in the octic half of a hybrid alone."""

    def turn(images: torch.Tensor) -> torch.Tensor:
        turned = images.rot90(element[0], dims=(-2, -1))
        return turned.flip(-1) if element[1] else turned

    images = IMAGES.double()
    for invariant, blocks in ((True, (0, 1, 2, 3)), (False, (0, 1))):
        net = shaken(OcticVisionTransformer(**SIZES, num_classes=0, invariant=invariant))
        for block in blocks:
            still = attention_maps(net, images, block=block, query=query)
            turned = attention_maps(net, turn(images), block=block, query=query)
            torch.testing.assert_close(turned, turn(still), atol=1e-10, rtol=0)
    assert (turned - turn(still)).abs().max() < 1e-10
    still = attention_maps(net, images, query=query)
    assert (attention_maps(net, turn(images), query=query) - turn(still)).abs().max() > 1e-3
    plain = shaken(VisionTransformer(**SIZES, num_classes=0))
    still = attention_maps(plain, images, query=query)
    assert (attention_maps(plain, turn(images), query=query) - turn(still)).abs().max() > 1e-3


def test_rollout_of_one_block():
    """Half of the attention, as the class token keeps half of itself."""
    net = shaken(VisionTransformer(**{**SIZES, "depth": 1}, num_classes=0))
    images = IMAGES.double()
    mean = attention_maps(net, images).mean(dim=1, keepdim=True)
    torch.testing.assert_close(attention_rollout(net, images), mean / 2)


@any_backbone
def test_pictures_are_written(backbone, tmp_path):
    net = make(backbone)
    paths = draw_attention(net, IMAGES[:1], tmp_path / "new")
    assert [path.name for path in paths] == ["attention.png", "attention_heads.png"]
    for path in paths:
        with Image.open(path) as picture:
            assert min(picture.size) > 100
    (path,) = draw_attention(net, IMAGES[:1], tmp_path, rollout=True, element="m")
    assert path.is_file()


def test_nets_that_have_no_such_maps_are_refused():
    with pytest.raises(UserError, match="no attention over all its patches"):
        attention_maps(timm_backbone("resnet18"), IMAGES)
    # Its map is smaller than its patches say, which is not what is wrong.
    with pytest.raises(UserError, match="no attention over all its patches"):
        attention_maps(gevit_rotmnist_z2(), torch.randn(1, 1, 28, 28))
    net = timm_backbone("vit_base_patch16_siglip_224", depth=1, embed_dim=64, num_heads=2)
    images = torch.randn(1, 3, 224, 224)
    with pytest.raises(UserError, match="no class token; query=patches"):
        attention_maps(net, images)
    assert attention_maps(net, images, query="patches").shape == (1, 2, 14, 14)


def test_words_are_checked():
    net = VisionTransformer(**SIZES, num_classes=0)
    for maps in (attention_maps, attention_rollout):
        with pytest.raises(UserError, match="query must be one of .*, not 'all'"):
            maps(net, IMAGES, query="all")
    with pytest.raises(UserError, match="block 4 asked of a net with attention in 4 blocks"):
        attention_maps(net, IMAGES, block=4)


def test_tokens_behind_the_patches_are_no_patches():
    """DHVT appends the tokens of its heads."""
    net = shaken(DHVT(img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=4))
    images = IMAGES.double()
    with torch.no_grad(), AttentionRecorder(slice(None)) as recorder:
        net.features(images)
    weights = recorder.weights[-1]
    assert weights.shape[-1] == 1 + 64 + 4
    expected = weights[:, :, 0, 1:65].unflatten(-1, (8, 8)) * 69
    torch.testing.assert_close(attention_maps(net, images), expected)
    expected = weights[:, :, 1:65, 1:65].mean(dim=2).unflatten(-1, (8, 8)) * 69
    torch.testing.assert_close(attention_maps(net, images, query="patches"), expected)
    first, last = ((part.mean(dim=1) + torch.eye(69)) / 2 for part in recorder.weights)
    flow = last @ first
    for query, row in (("class", flow[:, 0]), ("patches", flow[:, 1:65].mean(dim=1))):
        expected = row[:, None, 1:65].unflatten(-1, (8, 8)) * 69
        torch.testing.assert_close(attention_rollout(net, images, query=query), expected)


def titles(monkeypatch, tmp_path, net, **options) -> list[str]:
    """What the pictures of a net are called."""
    found = []

    def draw(columns, what):
        found.append(what)

    monkeypatch.setattr("evaluation.pictures.attention._draw", draw)
    monkeypatch.setattr("evaluation.pictures.attention.save", lambda figure, path: path)
    draw_attention(net, IMAGES[:1], tmp_path, **options)
    return found


def test_titles_name_the_blocks_that_are_drawn(monkeypatch, tmp_path):
    """Tokens are merged in block 0, so that it is the last with all patches, and the only one."""
    plain = VisionTransformer(**SIZES, num_classes=0)
    assert titles(monkeypatch, tmp_path, plain)[1] == "attention of the class token, last block"
    second = titles(monkeypatch, tmp_path, plain, block=-3, query="patches")[1]
    assert second == "attention of the patches, block 1"
    assert titles(monkeypatch, tmp_path, plain, rollout=True) == [
        "rollout of attention, class token"
    ]
    net = Reduced(plain, ToMe(1))  # one token fewer is as many as there are patches
    last = titles(monkeypatch, tmp_path, net)[1]
    assert last == "attention of the class token, block 0, the last with all patches"
    with pytest.raises(UserError, match="block 3 has no attention over all .*; block 1 is the fi"):
        attention_maps(net, IMAGES, block=3)
    net = Reduced(plain, EViT(0.5, [1]))
    assert titles(monkeypatch, tmp_path, net, rollout=True) == [
        "rollout of attention, class token, over the blocks with all patches (0, 1)"
    ]


def test_blocks_whose_attention_is_unseen_are_not_passed_over(monkeypatch, tmp_path):
    """ATS writes its attention out, so that the last one seen is not the net's last."""
    net = Reduced(VisionTransformer(**SIZES, num_classes=0), AdaptiveSampling([2, 3]))
    last = titles(monkeypatch, tmp_path, net)[1]
    assert last == "attention of the class token, block 1, the last with all patches"
    assert titles(monkeypatch, tmp_path, net, rollout=True) == [
        "rollout of attention, class token, over the blocks with all patches (0, 1)"
    ]
    with pytest.raises(UserError, match="block 3 has no attention over all .*; block 2 is the fi"):
        attention_maps(net, IMAGES, block=3)


def test_attention_of_the_class_token_alone_tells_nothing_of_the_patches():
    """SMYRF asks torch for the class token's; the patches attend within clusters of its own."""
    net = Reduced(VisionTransformer(**SIZES, num_classes=0), Smyrf(query_cluster_size=4))
    assert attention_maps(net, IMAGES).isfinite().all()
    for maps, options in ((attention_maps, {"query": "patches"}), (attention_rollout, {})):
        with pytest.raises(UserError, match="no attention over all its patches"):
            maps(net, IMAGES, **options)
