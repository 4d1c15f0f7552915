"""The hub's format: what is written is read back by timm and by our adapter, with equal outputs."""

import json

import pytest
import timm
import torch

import octic  # noqa: F401  (registers its models)
from baselines import dhvt, flopping, gevit  # noqa: F401
from baselines.posthoc import vision_transformer  # noqa: F401
from baselines.posthoc.symmetrized import Symmetrized
from baselines.token_reduction.presets import make_reducer
from baselines.token_reduction.reduced import Reduced
from octic.invariants import TrivialPart
from vit import hub
from vit.adapters import TimmBackbone
from vit.models import filter_state
from vit.weights import load_state

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
OCTIC = {**SMALL, "num_classes": 5, "init_values": 1.0}
RESMLP = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_classes": 5}
CONVNEXT = {"img_size": 32, "depths": (1, 1), "dims": (32, 64), "num_classes": 5}


def create(name, options):
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hybrid_deit_small_patch16", OCTIC),
        ("hybrid_deit_small_patch16", {**OCTIC, "group": "C4", "octic_equi_break_layer": 2}),
        ("d8_inv_early_deit_small_patch16", {**OCTIC, "invariant": "polynomial"}),
        ("dinov2_vit_small_patch16", {**SMALL, "init_values": 1.0}),
        ("deit_small_patch16_LS", OCTIC),
        ("resnet18", {"num_classes": 5}),
        ("resmlp_12", RESMLP),
        ("resmlp_equi_d2_12", {**RESMLP, "invariant": "power_spectrum"}),
        ("d2_convnext_tiny", CONVNEXT),
        ("convnext_isotropic_small", {**CONVNEXT, "depths": (2,), "dims": (64,)}),
        ("dhvt_tiny_cifar_patch4", {**SMALL, "patch_size": 4, "num_classes": 5}),
        ("gevit_cifar10_z2", {"num_channels": 9, "num_classes": 5}),
        ("posthoc_vit_pcam", {"img_size": 32, "patch_size": 4, "num_classes": 5}),
    ],
)
def test_other_sizes_survive_the_round_trip(name, options, tmp_path):
    """timm builds the same net from the folder, sizes and classes included."""
    net = create(name, options)
    hub.save_to_folder(net, tmp_path, options=options, class_names=list("abcde"))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(again(images), net(images), rtol=0, atol=0)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == name
    assert config.get("label_names") == (list("abcde") if net.num_classes == 5 else None)
    assert hub.largest_difference(net, tmp_path, [torch.randn(2, 3, 32, 32)]) == 0


@pytest.mark.parametrize("name", ["hybrid_deit_small_patch16", "deit_small_patch16_LS"])
def test_timms_call_for_fine_tuning_takes_what_we_export(name, tmp_path):
    """Other classes, none, another image size: the head is new, positions are resampled."""
    net, images = create(name, OCTIC), torch.randn(2, 3, 64, 64)
    hub.save_to_folder(net, tmp_path, options=OCTIC)
    for num_classes in (7, 0):
        again = timm.create_model(
            f"local-dir:{tmp_path}", pretrained=True, num_classes=num_classes, img_size=64
        ).eval()
        assert again(images).shape == (2, num_classes or 64) and again.img_size == (64, 64)
        ours, theirs = net.forward_features(images), again.forward_features(images)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_timm_gives_no_fresh_head_that_was_not_asked_for():
    """A file of other classes than its description says is refused."""
    name = "deit_small_patch16_LS"
    net, other = (create(name, {**OCTIC, "num_classes": count}) for count in (1000, 5))
    with pytest.raises(ValueError, match="do not fit: head: 5 classes in the file, 1000 here"):
        filter_state(other.state_dict(), net)
    assert filter_state(net.state_dict(), other).keys() == other.state_dict().keys()


def test_an_invariantization_taken_from_the_weights_survives(tmp_path):
    """A net that changed itself to its file is written as what it became."""
    name = "d8_inv_early_deit_small_patch16"
    net = create(name, OCTIC)
    load_state(net, create(name, {**OCTIC, "invariant": "polynomial"}).state_dict())
    hub.save_to_folder(net, tmp_path, options=OCTIC)
    assert hub.largest_difference(net, tmp_path, [torch.randn(2, 3, 32, 32)]) == 0


@pytest.mark.parametrize("name", ["hybrid_deit_small_patch16", "vit_tiny_patch16_224"])
def test_the_adapter_takes_a_folder_for_a_name(name, tmp_path):
    """`TimmBackbone("local-dir:...")` has the weights, and the head only where it is asked for."""
    options = {**SMALL, "num_classes": 5}
    torch.manual_seed(0)
    net = TimmBackbone(name, **options).eval()
    hub.save_to_folder(net, tmp_path, options=options)
    images = torch.randn(2, 3, 48, 48)
    again = TimmBackbone(f"local-dir:{tmp_path}").eval()
    for ours, theirs in zip(net.features(images)[0], again.features(images)[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert again(images).shape == (2, 64)
    for num_classes in (5, None):
        whole = TimmBackbone(f"local-dir:{tmp_path}", num_classes=num_classes).eval()
        torch.testing.assert_close(whole(images), net(images), rtol=0, atol=0)
    with pytest.raises(ValueError, match="tells 5 classes apart, not 7"):
        TimmBackbone(f"local-dir:{tmp_path}", num_classes=7)


def test_names_that_lead_nowhere_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="holds no config.json"):
        TimmBackbone(f"local-dir:{tmp_path}")
    with pytest.raises(ValueError, match="unknown source in 'ftp:x'; known: local-dir:FOLDER"):
        TimmBackbone("ftp:x")
    with pytest.raises(ValueError, match="timm has no model 'vit_x'$"):
        TimmBackbone("vit_x")
    with pytest.raises(ValueError, match="225'; did you mean 'vit_small_patch16_224'[?]$"):
        TimmBackbone("vit_small_patch16_225")
    (tmp_path / "config.json").write_text('{"architecture": "of_another_package"}')
    with pytest.raises(ValueError, match="'of_another_package'; a package that registers it must"):
        TimmBackbone(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("side", [32, (32, 48)])
@pytest.mark.parametrize("name", ["hybrid_deit_small_patch16", "vit_tiny_patch16_224"])
def test_timm_is_told_the_networks_own_size(name, side, tmp_path):
    """So that its standard pipeline does not resize to 224."""
    options = {**SMALL, "img_size": side, "in_chans": 1, "num_classes": 5}
    if name.startswith("hybrid"):
        options |= {"group": "mirror"}  # which takes oblong images
    net = TimmBackbone(name, **options).eval()
    hub.save_to_folder(net, tmp_path, options=options)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    sides = (side, side) if isinstance(side, int) else side
    assert timm.data.resolve_model_data_config(again)["input_size"] == (1, *sides)


@pytest.mark.parametrize("group", ["D4", "C4", None])
@pytest.mark.parametrize(("old", "new"), [(3, 1), (3, 4), (1, 3)])
def test_timms_call_adapts_the_channels(group, old, new, tmp_path, caplog):
    """As timm does for its own: one grey channel counts for three equal ones. No warning."""
    name = "hybrid_deit_small_patch16" if group else "deit_small_patch16_LS"
    options = {**OCTIC, "in_chans": old, **({"group": group} if group else {})}
    net = create(name, options)
    hub.save_to_folder(net, tmp_path, options=options)
    caplog.clear()
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=new).eval()
    grey = torch.randn(2, 1, 32, 32)
    ours, theirs = (n(grey.expand(-1, n.in_chans, -1, -1)) for n in (net, again))
    if 1 in (old, new):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert theirs.shape == (2, 5) and not caplog.records


def test_timm_adapts_no_channels_that_were_not_asked_for():
    """A file of other channels than its description says is refused."""
    name = "deit_small_patch16_LS"
    net, other = (create(name, {**OCTIC, "in_chans": count}) for count in (3, 1))
    with pytest.raises(ValueError, match="do not fit: patch_embed: 1 channels in the file, 3"):
        filter_state(other.state_dict(), net)


def test_a_size_asked_for_is_the_size_that_is_written(tmp_path):
    net = create("hybrid_deit_small_patch16", OCTIC)
    hub.save_to_folder(net, tmp_path, options=OCTIC, size=48)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 48, 48]
    assert hub.largest_difference(net, tmp_path, [torch.randn(2, 3, 48, 48)]) == 0


def test_a_net_whose_outputs_are_not_finite_differs_from_its_folder(tmp_path):
    net = create("deit_small_patch16_LS", OCTIC)
    torch.nn.init.constant_(net.head.bias, torch.nan)
    hub.save_to_folder(net, tmp_path, options=OCTIC)
    found = hub.largest_difference(net, tmp_path, [torch.randn(2, 3, 32, 32)])
    assert found == float("inf")


def test_what_timm_cannot_build_again_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a Linear is not registered with timm"):
        hub.save_to_folder(torch.nn.Linear(2, 2), tmp_path, options={})


def test_a_keyword_that_a_config_builds_is_refused(tmp_path):
    """Such as a group of one's own: the folder could not be read again."""
    net = create("hybrid_deit_small_patch16", OCTIC)
    for key in ("group", "invariant"):
        if key == "invariant":
            net.invariant = TrivialPart
        options = {**OCTIC, key: {"_target_": "my_package.mine"}}
        with pytest.raises(ValueError, match=f"{key} is an object that a config builds, which the"):
            hub.save_to_folder(net, tmp_path, options=options)
    assert not list(tmp_path.iterdir())


def test_a_net_around_a_registered_one_is_not_taken_for_it(tmp_path):
    inner = create("deit_small_patch16_LS", OCTIC)
    for net in (Symmetrized(inner), Reduced(inner, make_reducer("tome", r=4))):
        with pytest.raises(ValueError, match=f"a {type(net).__name__} is not registered"):
            hub.save_to_folder(net, tmp_path, options=OCTIC)
    assert list(tmp_path.iterdir()) == []


def test_pushing_without_token_or_network_is_one_line(monkeypatch):
    import huggingface_hub

    net = create("hybrid_deit_small_patch16", OCTIC)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="no token of the Hugging Face hub here"):
        hub.push(net, "user/name", options=OCTIC)
    with pytest.raises(ValueError, match="'name' is no repository of the hub"):
        hub.push(net, "name", options=OCTIC)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")

    def unreachable(*arguments, **options):
        raise ConnectionError("Name or service not known\nand a second line")

    monkeypatch.setattr(hub, "push_to_hf_hub", unreachable)
    with pytest.raises(ValueError, match="^could not push to user/name: Name or service"):
        hub.push(net, "user/name", options=OCTIC)


def test_what_the_hub_itself_refuses_is_one_line(monkeypatch):
    """Its errors are of many kinds; the package that they come from tells them."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    def refused(*arguments, **options):
        raise HFValidationError("Repo id must be of other letters\nand a second line")

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    monkeypatch.setattr(hub, "push_to_hf_hub", refused)
    with pytest.raises(ValueError, match="^could not push to user/name: Repo id .* letters$"):
        hub.push(create("deit_small_patch16_LS", OCTIC), "user/name", options=OCTIC)


@pytest.mark.parametrize("name", ["a user/name", "user/na--me", "user/", "/name"])
def test_a_name_that_no_repository_can_have_is_told_before_anything_is_sent(name, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    with pytest.raises(ValueError, match=f"^{name!r} is no .* spelt user/name: [^\n]+$"):
        hub.check_push(name)


def test_registers_alone_are_no_class_token():
    """The class feature of a net with registers and without class token is the mean patch."""
    options = {**SMALL, "class_token": False, "reg_tokens": 2, "global_pool": "avg"}
    net = TimmBackbone("vit_tiny_patch16_224", **options).eval()
    found = net.features(torch.randn(2, 3, 32, 32))[0]
    torch.testing.assert_close(found.cls, found.patches.mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_a_mistake_of_ours_is_not_taken_for_the_networks(monkeypatch):
    import huggingface_hub

    def broken(*arguments, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    monkeypatch.setattr(hub, "push_to_hf_hub", broken)
    with pytest.raises(RuntimeError, match="^a bug"):
        hub.push(create("hybrid_deit_small_patch16", OCTIC), "user/name", options=OCTIC)


def test_what_is_pushed_is_what_is_written(monkeypatch):
    import huggingface_hub

    net, sent = create("hybrid_deit_small_patch16", OCTIC), {}
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    monkeypatch.setattr(hub, "push_to_hf_hub", lambda *words, **options: sent.update(options))
    address = hub.push(net, "user/name", options=OCTIC, class_names=list("abcde"))
    assert address == "hf-hub:user/name" and sent["safe_serialization"] is True
    assert sent["model_args"]["embed_dim"] == 64
    assert sent["model_config"]["label_names"] == list("abcde")
