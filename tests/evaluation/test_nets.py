"""A node and a file of weights make a net, strictly; the file brings what the node leaves open."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from evaluation.nets import (
    complete,
    count_classes,
    has_classes,
    load_strictly,
    make_net,
    name_of,
    other_model,
    warn_if_random,
    weights_file,
    weights_in_words,
)
from tests.evaluation.backbones import OCTIC, PLAIN, TIMM, TINY, exported
from utils.errors import UserError
from utils.run_files import EXPORTED
from vit.weights import read_state

WRAPPERS = {
    "symmetrized": {"_target_": "baselines.posthoc.symmetrized.symmetrized"},
    "reduced": {"_target_": "baselines.token_reduction.reduced.reduced", "method": "evit"},
}
FROM_FILE = {"_target_": "evaluation.adapters.encoder_from_file", "path": "encoders/mine.py"}


def test_weights_are_loaded_strictly(tmp_path):
    net = make_net(OCTIC, None, seed=1)
    state = {f"backbone.{name}": value for name, value in net.state_dict().items()}
    torch.save({"teacher": state}, tmp_path / "w")
    found = make_net(OCTIC, str(tmp_path / "w"), seed=2)
    for name, value in net.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    with pytest.raises(UserError, match="missing.*left over"):
        make_net(PLAIN, str(tmp_path / "w"))
    with pytest.raises(UserError, match="no such weights file"):
        make_net(PLAIN, str(tmp_path / "nothing.pth"))


def test_timm_weights_are_loaded_into_the_wrapped_net(tmp_path):
    net = make_net(TIMM, None, seed=1)
    torch.save(net.net.state_dict(), tmp_path / "timm.pth")
    found = make_net(TIMM, str(tmp_path / "timm.pth"), seed=2)
    assert torch.equal(found.net.cls_token, net.net.cls_token)


@pytest.mark.parametrize("backbone", [OCTIC, TIMM], ids=["octic", "timm"])
def test_a_run_folder_brings_the_sizes_of_its_net(backbone, tmp_path):
    """The file says what its net was built with; nobody must repeat it."""
    run, state = exported(backbone, tmp_path / "run")
    named = {key: value for key, value in backbone.items() if key not in TINY}
    found = make_net(named, run, seed=2).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    with pytest.raises(UserError, match="without exported"):
        make_net(named, str(tmp_path))


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_a_run_folder_brings_the_sizes_of_the_net_inside(wrapper, tmp_path):
    plain = {"_target_": "vit.models.deit_small_patch16_LS", "_partial_": True, **TINY}
    run, state = exported(plain, tmp_path / "plain")
    named = {**wrapper, "backbone": {"_target_": plain["_target_"], "_partial_": True}}
    found = make_net(named, run, seed=2)
    inner = getattr(found, "model", getattr(found, "net", None))
    assert all(torch.equal(inner.state_dict()[name], state[name]) for name in state)
    # The file of the whole brings the whole, and what is spelt out stays.
    whole, state = exported({**named, "backbone": plain}, tmp_path / "whole")
    found = make_net(named, whole, seed=2).state_dict()
    assert all(torch.equal(found[name], state[name]) for name in state)
    other = {**wrapper, "backbone": {"_target_": OCTIC["_target_"], "_partial_": True}}
    with pytest.raises(
        UserError, match="are of a deit_small_patch16_LS, not a hybrid_.*; backbone"
    ):
        make_net(other, run)


def test_a_net_without_features_is_refused():
    with pytest.raises(UserError, match="no Backbone.*use backbone=timm"):
        make_net({"_target_": "timm.models.resnet18"}, None)


def test_an_article_fits_its_name(tmp_path):
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="do not fit an OcticVisionTransformer"):
        make_net(OCTIC, str(tmp_path / "w.pth"))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    net = make_net(OCTIC, None)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    state["norm.weight"][0] = torch.nan
    torch.save({"model": state}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w.pth holds weights that are not finite \(norm.weight\)"):
        make_net(OCTIC, str(tmp_path / "w.pth"))
    statistics = nn.BatchNorm2d(2)
    state = statistics.state_dict() | {"running_var": torch.tensor([1, torch.nan])}
    with pytest.raises(UserError, match=r"not finite \(running_var\)"):
        load_strictly(statistics, state, "w.pth")


def test_weights_may_lie_at_home(tmp_path, monkeypatch):
    """`--weights=~/run`: no shell puts the folder in the place of ~ behind a =."""
    monkeypatch.setenv("HOME", str(tmp_path))
    exported = tmp_path / "run" / EXPORTED
    exported.parent.mkdir(parents=True)
    save_file({"weight": torch.ones(2)}, exported)
    assert weights_file("~/run") == str(exported)
    assert weights_file(f"~/run/{EXPORTED}") == str(exported)
    assert read_state(f"~/run/{EXPORTED}").keys() == {"weight"}


@pytest.mark.parametrize(
    ("backbone", "path", "words"),
    [
        (TIMM, "runs/a", "runs/a"),
        (TIMM, None, "random initialisation"),
        ({**TIMM, "pretrained": True}, None, "its own"),
        ({**TIMM, "model_name": "local-dir:runs/hub"}, None, "its own"),
        (FROM_FILE, None, "its own"),
        *(
            ({**node, "backbone": TIMM}, None, "random initialisation")
            for node in WRAPPERS.values()
        ),
        *(
            ({**w, "backbone": {**TIMM, "pretrained": True}}, None, "its own")
            for w in WRAPPERS.values()
        ),
        *(({**w, "backbone": FROM_FILE}, None, "its own") for w in WRAPPERS.values()),
    ],
)
def test_a_title_says_which_weights_were_judged(backbone, path, words, capsys):
    assert weights_in_words(backbone, path) == words
    warn_if_random(backbone, path, flag="--weights", doing="judging")
    warned = "no weights given (--weights FILE): judging the random initialisation\n"
    assert capsys.readouterr().out == (warned if words == "random initialisation" else "")


def test_an_encoder_of_a_file_has_the_files_name_and_no_classes_of_ours(tmp_path):
    assert name_of(FROM_FILE) == "mine"
    assert complete(FROM_FILE, {}, None, None) == FROM_FILE
    state = {"head.weight": torch.zeros(3, 4)}
    for node in (
        FROM_FILE,
        {"_target_": "x.wrapped", "backbone": {**FROM_FILE, "_partial_": True}},
    ):
        assert complete(node, {}, state, None) == node


@pytest.mark.parametrize("name", ["ese_vovnet19b_dw", "mambaout_femto", "resnet10t", "levit_128s"])
def test_the_classes_of_a_file_are_those_of_its_head(name):
    """Also where a layer within a block has a head's name, in any order of the keys."""
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=7).state_dict()
    assert count_classes(state) == 7
    for keys in (sorted(state), sorted(state, reverse=True)):
        assert count_classes({f"module.{key}": state[key] for key in keys}) == 7
    assert count_classes({"blocks.0.attn.qkv.weight": torch.zeros(3, 1)}) is None


def test_weights_of_a_net_of_the_users_own_are_named_by_their_class(monkeypatch):
    monkeypatch.setenv("OCTIC_PACKAGES", "my_nets")
    told = other_model(PLAIN, {"_target_": "my_nets.Mine"})
    assert "are of a Mine" in told and "backbone._target_=my_nets.Mine" in told
    assert "--model" not in told


def test_a_head_of_several_layers_is_a_classifier() -> None:
    net = timm.create_model("deit_tiny_patch16_LS", depth=1, num_classes=3)
    assert has_classes(net)
    net.head = nn.Sequential(nn.Linear(192, 8), nn.GELU(), nn.Linear(8, 3))
    assert has_classes(net)
    net.reset_classifier(0)
    assert not has_classes(net)


def test_weights_that_are_no_path_are_refused():
    for wrong in (2024, 0, False, []):  # the latter are not `null`, which asks for a random net
        with pytest.raises(UserError, match="weights must be text, a path, not .*: quote it"):
            weights_file(wrong)
    assert weights_file(None) is None
