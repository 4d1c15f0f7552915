"""Weights move to other image sizes and class counts, and positions keep their symmetries."""

import json
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import octic  # noqa: F401 (registers the models)
from octic.actions import act_on_tokens
from octic.expansion import slots
from octic.groups import get_group
from octic.patch_embed import Unfold
from octic.vision_transformer import OcticVisionTransformer
from vit.adapters import timm_backbone
from vit.finetune import adapt_state, load_adapted
from vit.vision_transformer import VisionTransformer, resample_grid

GROUPS = ("D4", "C4", "V4", "mirror", "half_turn")
TINY: dict[str, Any] = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
TINY |= {"init_values": 0.5}


def make(kind: str = "octic", seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    cls = VisionTransformer if kind == "plain" else OcticVisionTransformer
    options = {**TINY, "img_size": 16, "num_classes": 3, **options}
    if kind == "invariant":
        options["invariant"] = True
    net = cls(**options).eval()
    for parameter in net.parameters():  # no zero or identity is left
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("scaled", [False, True])
def test_folding_undoes_unfolding(group, scaled):
    """A symmetric field is the unfolding of what it folds to; a second folding changes nothing."""
    group = get_group(group)
    unfold = Unfold(6, 4 if len(group.elements) == 2 else 6, scaled=scaled, group=group)
    slabs = torch.randn(len(slots(group)), 3, *unfold.slab, dtype=torch.float64)
    slabs[0] = 0
    field = unfold(slabs)
    folded = unfold.fold(field)
    assert torch.allclose(unfold(folded), field, atol=1e-12)
    assert torch.allclose(unfold.fold(unfold(folded)), folded, atol=1e-12)
    assert folded.norm() <= slabs.norm() + 1e-12


@pytest.mark.parametrize("kind", ["octic", "invariant", "plain"])
def test_other_resolution_is_what_the_old_net_does_there(kind):
    """A net built for 24 pixels, loaded from one for 16, computes what that one does at 24."""
    old, new = make(kind), make(kind, seed=1, img_size=24)
    state, notes = adapt_state(old.state_dict(), new)
    assert [words for _, words in notes] == [
        "pos_embed: resampled from 4 x 4 to 6 x 6 patches"
        + ("" if kind == "plain" else ", symmetries kept")
    ]
    new.load_state_dict(state)
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        assert torch.allclose(new(images), old(images), atol=1e-5)


def test_an_oblong_grid_is_not_taken_for_a_square():
    """50 positions of 5 x 10 patches are no 7 x 7 and a class token, nor are 51 no grid."""
    oblong = {"img_size": (20, 40)}
    for old, new in ((False, True), (True, False)):
        old, new = (make("plain", class_position=own, **oblong) for own in (old, new))
        state, notes = adapt_state(old.state_dict(), new)
        assert len(notes) == 1 and "class token" in notes[0].words
        assert torch.equal(state["pos_embed"][:, -50:], old.pos_embed[:, -50:])
    alone = make("plain", class_token=False, global_pool="avg", **oblong)
    with pytest.raises(ValueError, match="50 positions, which is no square grid"):
        adapt_state(alone.state_dict(), make("plain", class_token=False, global_pool="avg"))


@pytest.mark.parametrize("group", GROUPS)
def test_positions_of_every_group_move(group):
    old, new = make(group=group, num_heads=1), make(group=group, num_heads=1, img_size=24, seed=1)
    new.load_state_dict(adapt_state(old.state_dict(), new)[0])
    images = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        assert torch.allclose(new(images), old(images), atol=1e-5)


def test_resized_octic_net_stays_equivariant():
    """The logits of an invariant net do not change under a turn, and its features turn along."""
    new = make("invariant", seed=1, img_size=24).double()
    old = make("invariant").double()
    new.load_state_dict(adapt_state(old.state_dict(), new)[0])
    images = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    with torch.no_grad():
        for turned in (images.rot90(1, (-2, -1)), images.flip(-1)):
            assert torch.allclose(new(turned), new(images), atol=1e-10)


@pytest.mark.parametrize("kind", ["invariant", "plain"])
def test_other_image_channels_are_adapted_as_timm_does(kind):
    """All filters of a lift: the net for one channel sees what the old one sees in grey images."""
    old, new, grey = make(kind), make(kind, seed=1, in_chans=1), torch.randn(2, 1, 16, 16)
    state, notes = adapt_state(old.state_dict(), new)
    told = "patch_embed: 3 channels in the file, 1 here; its filters are summed"
    assert notes == [("channels", told)]
    new.load_state_dict(state)
    with torch.no_grad():
        assert torch.allclose(new(grey), old(grey.expand(-1, 3, -1, -1)), atol=1e-5)
    with pytest.raises(ValueError, match="of another shape: patch_embed"):
        adapt_state(make(kind, patch_size=8, img_size=32).state_dict(), new)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_channels_of_timms_networks_are_adapted(name, tmp_path):
    options = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
    if name.startswith("vit"):
        options = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    old, new = (timm_backbone(name, **options, in_chans=n).eval() for n in (3, 1))
    save_file(old.state_dict(), tmp_path / "old.safetensors")
    notes = load_adapted(new, tmp_path / "old.safetensors")
    assert [note.partition(": ")[2] for note in notes] == [
        "3 channels in the file, 1 here; its filters are summed"
    ]
    grey = torch.randn(1, 1, 224, 224)
    with torch.no_grad():
        assert torch.allclose(new(grey), old(grey.expand(-1, 3, -1, -1)), atol=1e-4)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("in_chans", [1, 2, 5])
def test_adapted_filters_stay_equivariant(group, in_chans):
    """The image moves, the features move along."""
    options: dict[str, Any] = {"group": group, "num_heads": 1}
    old = make(**options).double()
    new = make(**options, in_chans=in_chans, seed=1).double()
    new.load_state_dict(adapt_state(old.state_dict(), new)[0])
    images = torch.randn(1, in_chans, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        features = new.patch_embed(images)
        assert features.abs().max() > 0.1
        for element in get_group(group).elements:
            moved = new.patch_embed(element.on_images(images))
            expected = act_on_tokens(features.flatten(1, 2), element, get_group(group), (4, 4))
            assert torch.allclose(moved.flatten(1, 2), expected, atol=1e-12)


@pytest.mark.parametrize("kind", ["octic", "plain"])
def test_head_is_replaced_where_classes_differ(kind):
    old, new = make(kind), make(kind, seed=1, num_classes=7)
    fresh = new.head.weight.clone()
    state, notes = adapt_state(old.state_dict(), new)
    assert notes == [("head", "head: 3 classes in the file, 7 here; it starts afresh")]
    assert torch.equal(state["head.weight"], fresh)
    assert torch.equal(state["norm.weight"], old.norm.weight)
    for count, said in ((0, "head: 3 classes in the file, dropped"), (3, "")):
        notes = adapt_state(old.state_dict(), make(kind, num_classes=count))[1]
        assert "".join(words for _, words in notes).startswith(said) and bool(notes) == bool(said)


def test_a_self_supervised_teacher_becomes_a_classifier():
    teacher = make("plain", num_classes=0, class_position=True, mask_token=True)
    net = make("plain", seed=1)
    state, notes = adapt_state(
        {f"backbone.{k}": v for k, v in teacher.state_dict().items()}
        | {"dino_head.last_layer.weight": torch.ones(2)},
        net,
    )
    assert [note.words.split(":")[0] for note in notes] == ["head", "mask_token", "pos_embed"]
    net.load_state_dict(state)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(
            net.forward_features(images), teacher.forward_features(images), atol=1e-6
        )


def test_everything_else_must_fit():
    net = make("plain")
    state = dict(net.state_dict())
    state["blocks.0.extra"] = state.pop("blocks.0.norm1.bias")
    with pytest.raises(ValueError, match="missing: blocks.0.norm1.bias; left over: blocks.0.extra"):
        adapt_state(state, make("plain", num_classes=5))
    with pytest.raises(ValueError, match="of another shape: .*head.weight"):
        adapt_state(make("plain", embed_dim=64).state_dict(), net)
    with pytest.raises(ValueError, match="no square grid"):
        adapt_state(net.state_dict() | {"pos_embed": torch.zeros(1, 12, 32)}, net)


def test_timm_weights_go_into_ours_and_into_timm(tmp_path):
    """timm's ViT, at its own resolution, computes the same in our plain ViT without a class
    position; its adapter takes the file at another resolution and class count."""
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2
    ).eval()
    file = tmp_path / "timm.safetensors"
    save_file(theirs.state_dict(), file)
    options = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    ours = VisionTransformer(img_size=32, num_classes=4, **options).eval()
    notes = load_adapted(ours, file)
    assert notes[0] == "head: 1000 classes in the file, 4 here; it starts afresh"
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.forward_features(images)
        assert torch.allclose(ours.forward_features(images), expected, atol=1e-5)
    adapter = timm_backbone("vit_tiny_patch16_224", img_size=48, num_classes=4, **options)
    notes = load_adapted(adapter, file)
    assert notes[1] == "pos_embed: resampled from 4 x 4 to 6 x 6 patches"
    assert torch.equal(adapter.net.pos_embed[:, 0], theirs.pos_embed[:, 0])
    exported = tmp_path / "adapter.safetensors"
    save_file(adapter.state_dict(), exported, {"constructor": json.dumps({})})
    assert load_adapted(
        timm_backbone("vit_tiny_patch16_224", img_size=48, **options), exported
    ) == ["head: 4 classes in the file, dropped: the model has no classifier"]


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224"])
def test_every_prefix_token_keeps_its_position(name):
    """Of class and distillation token, and of timm's registers; each of two heads starts afresh."""
    options = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    if "distilled" not in name:
        options["reg_tokens"] = 3
    old, new, same = (
        timm.create_model(name, img_size=size, num_classes=count, **options)
        for size, count in ((16, 3), (24, 5), (16, 3))
    )
    assert adapt_state(old.state_dict(), same)[1] == []
    state, notes = adapt_state(old.state_dict(), new)
    assert [words for _, words in notes] == [
        "head: 3 classes in the file, 5 here; it starts afresh",
        "pos_embed: resampled from 4 x 4 to 6 x 6 patches",
    ]
    first = new.num_prefix_tokens
    assert torch.equal(state["pos_embed"][:, :first], old.pos_embed[:, :first])
    grid = resample_grid(old.pos_embed[:, first:].unflatten(1, (4, 4)), (6, 6))
    assert torch.equal(state["pos_embed"][:, first:], grid.flatten(1, 2))
    for part in (part for part in state if part.startswith("head")):
        assert torch.equal(state[part], new.state_dict()[part])
    new.load_state_dict(state)


@pytest.mark.parametrize("options", [{"reg_tokens": 3}, {"reg_tokens": 3, "class_token": False}])
def test_positions_that_have_no_place_are_added_to_their_tokens(options):
    """Of timm's registers as of its class token: the network computes what it did."""
    options |= {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    options |= {"num_classes": 3, "global_pool": "avg"}
    old, new = (
        timm.create_model("vit_tiny_patch16_224", no_embed_class=without, **options).eval()
        for without in (False, True)
    )
    torch.nn.init.normal_(old.pos_embed)
    new.load_state_dict(adapt_state(old.state_dict(), new)[0])
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(new(images), old(images), atol=1e-5)


def test_registers_without_positions_of_their_own_are_no_patches():
    """As in DINOv2 with registers: the class token alone has one."""
    options = TINY | {"num_register_tokens": 3, "class_position": True}
    old, new = (VisionTransformer(img_size=size, **options) for size in (16, 24))
    state, notes = adapt_state(old.state_dict(), new)
    assert notes == [("positions", "pos_embed: resampled from 4 x 4 to 6 x 6 patches")]
    new.load_state_dict(state)


def test_timm_names_are_not_taken_for_published_spellings():
    """A head named fc is found, and timm's own gamma_1 stays."""
    net = timm.create_model("resnet10t", num_classes=5)
    state, notes = adapt_state(timm.create_model("resnet10t", num_classes=7).state_dict(), net)
    assert notes == [("head", "fc: 7 classes in the file, 5 here; it starts afresh")]
    net.load_state_dict(state)
    beit = timm.create_model("beit_base_patch16_224", embed_dim=32, depth=1, num_heads=2)
    assert adapt_state(beit.state_dict(), beit)[1] == []


def test_a_wrong_file_is_one_line(tmp_path):
    file = tmp_path / "w.safetensors"
    save_file({"x": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"w\.safetensors: the weights do not fit") as error:
        load_adapted(make("plain"), file)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no such weights file"):
        load_adapted(make("plain"), tmp_path / "nothing.pth")
