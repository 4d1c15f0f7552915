"""SWAG's ViTs: published sizes, strict files of three layouts, positions resized as published."""

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.token_reduction.swag import SWAG, SwagVisionTransformer, swag_names
from vit.backbone import Backbone
from vit.weights import load_state, load_weights

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
TINY |= {"mlp_ratio": 2.0, "num_classes": 5}
# Parameters, multiply-adds of torchvision's metadata.
SIZES = {
    "swag_vit_b16_in1k": 86_859_496,
    "swag_vit_l16_in1k": 305_174_504,
    "swag_vit_h14_in1k": 633_470_440,
}


def tiny(**keywords) -> SwagVisionTransformer:
    torch.manual_seed(0)
    net = timm.create_model("swag_vit_l16_in1k", **{**TINY, **keywords}).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def swag_layout(net: SwagVisionTransformer, *, torchvision: bool = False, old: bool = False):
    """The weights as SWAG or torchvision spell them, written out key by key."""
    state = net.state_dict()
    layers = "encoder.layers.encoder_layer_" if torchvision else "encoder.layers.layer_"
    first, second = (
        ("mlp.0", "mlp.3") if torchvision and not old else ("mlp.linear_1", "mlp.linear_2")
    )
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "cls_token":
            found["class_token"] = tensor
        elif name == "pos_embed":
            found["encoder.pos_embedding"] = tensor if torchvision else tensor.transpose(0, 1)
        elif name.startswith("patch_embed.proj."):
            found[name.replace("patch_embed.proj", "conv_proj")] = tensor
        elif name.startswith("norm."):
            found[f"encoder.ln.{name.removeprefix('norm.')}"] = tensor
        elif name.startswith("head."):
            head = "heads.head." if torchvision else "head.layers.head."
            found[head + name.removeprefix("head.")] = tensor
        else:
            _, index, rest = name.split(".", 2)
            for ours, theirs in {
                "norm1": "ln_1",
                "norm2": "ln_2",
                "attn.qkv.weight": "self_attention.in_proj_weight",
                "attn.qkv.bias": "self_attention.in_proj_bias",
                "attn.proj": "self_attention.out_proj",
                "mlp.fc1": first,
                "mlp.fc2": second,
            }.items():
                rest = rest.replace(ours, theirs)
            found[f"{layers}{index}.{rest}"] = tensor
    return {name: tensor.clone() for name, tensor in found.items()}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    with torch.device("meta"):
        net = timm.create_model(name)
    assert sum(p.numel() for p in net.parameters()) == SIZES[name]
    assert isinstance(net, timm.models.VisionTransformer) and isinstance(net, Backbone)
    assert net.blocks[0].norm1.eps == 1e-6
    config = net.pretrained_cfg
    size = SWAG[name]["img_size"]
    assert config["input_size"] == (3, size, size) and config["crop_pct"] == 1.0
    assert net.pos_embed.shape[1] == 1 + (size // net.patch_size) ** 2


@pytest.mark.parametrize(
    "layout", [{}, {"torchvision": True}, {"torchvision": True, "old": True}], ids=str
)
def test_every_layout_loads_strictly(layout):
    net, other, images = tiny(), tiny(), torch.randn(2, 3, 16, 16)
    state = swag_layout(net, **layout)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    load_state(other, state)
    torch.testing.assert_close(other(images), net(images))
    for name in ("class_token", "encoder.ln.bias"):
        with pytest.raises(ValueError, match="missing"):
            load_state(other, {key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(ValueError, match=r"left over: encoder\.unknown"):
        load_state(other, {**state, "encoder.unknown": torch.zeros(1)})


def test_a_weight_in_two_spellings_is_left_over():
    net = tiny()
    state = swag_layout(net) | {"heads.head.bias": torch.zeros(5)}
    with pytest.raises(ValueError, match=r"left over: heads\.head\.bias"):
        load_state(net, state)
    for state in (
        swag_layout(net) | {"head.bias": torch.zeros(5)},
        {"head.bias": torch.zeros(5)} | swag_layout(net),
    ):
        with pytest.raises(ValueError, match=r"left over: head\.layers\.head\.bias"):
            load_state(net, state)


def test_files_of_timm_and_ours_load(tmp_path):
    net, images = tiny(), torch.randn(1, 3, 16, 16)
    torch.save(swag_layout(net), tmp_path / "vit_l16_in1k.torch")
    again = tiny()
    load_weights(again, tmp_path / "vit_l16_in1k.torch")
    torch.testing.assert_close(again(images), net(images))
    overlay = {"file": str(tmp_path / "vit_l16_in1k.torch"), "num_classes": 5}
    loaded = timm.create_model(
        "swag_vit_l16_in1k", pretrained=True, pretrained_cfg_overlay=overlay, **TINY
    ).eval()
    torch.testing.assert_close(loaded(images), net(images))
    load_state(again, net.state_dict())


def test_positions_are_resized_with_aligned_corners_and_the_dict_stays():
    """Class row kept, grid bicubic with align_corners; corners stay what they were."""
    net, other = tiny(), tiny(img_size=24)
    state = swag_layout(net)
    before = {name: tensor.clone() for name, tensor in state.items()}
    load_state(other, state)
    assert all(torch.equal(state[name], before[name]) for name in before)
    old, new = net.pos_embed[0], other.pos_embed[0]
    assert torch.equal(old[0], new[0])
    grid = old[1:].T.reshape(1, -1, 4, 4)
    wanted = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=True)
    torch.testing.assert_close(new[1:].T.reshape(1, -1, 6, 6), wanted)
    torch.testing.assert_close(new[[1, 6, 31, 36]], old[[1, 4, 13, 16]], atol=1e-5, rtol=1e-5)


def test_positions_of_no_square_grid_are_refused():
    state = swag_layout(tiny())
    state["encoder.pos_embedding"] = torch.zeros(16, 1, 24)
    with pytest.raises(ValueError, match="16 positions.*no square grid"):
        load_state(tiny(), state)


def test_without_class_token():
    """SWAG's classifier="gap": mean over all tokens after the norm."""
    net = tiny(class_token=False, global_pool="avg", fc_norm=False)
    images = torch.randn(2, 3, 16, 16)
    tokens = net.forward_features(images)
    torch.testing.assert_close(net(images), net.head(tokens.mean(dim=1)))
    torch.testing.assert_close(net.features(images)[0].cls, tokens.mean(dim=1))
    assert "cls_token" not in swag_names(net.state_dict())


def test_features_in_the_order_asked_for():
    net, images = tiny(), torch.randn(2, 3, 16, 16)
    last, first, again = net.features(images, layers=(-1, 0, 1))
    tokens = net.forward_features(images)
    torch.testing.assert_close(last.cls, tokens[:, 0])
    torch.testing.assert_close(last.patches, tokens[:, 1:].unflatten(1, (4, 4)))
    assert torch.equal(last.patches, again.patches) and not torch.equal(first.cls, last.cls)


def test_a_size_that_is_no_multiple_of_the_patch():
    with pytest.raises(
        ValueError,
        match="img_size 18 x 18 is not a multiple of the patch size 4; 16 x 16 and 20 x 20 are",
    ):
        tiny(img_size=18)
