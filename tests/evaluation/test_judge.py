"""One call judges any net: ours from an exported file, timm's by name; wrong files are refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from evaluation.judge import _report, judge
from evaluation.nets import make_net, weights_file, weights_in_words
from evaluation.results import in_words
from slurm.job import Job
from tests.evaluation.backbones import BACKBONES
from utils.checkpoints.exported import EXPORTED
from utils.errors import UserError
from utils.probing import ProbeRunner
from vit.weights import read_state

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
TINY["init_values"] = 1.0  # else the class token hardly looks at the image before training
OCTIC = {"_target_": "octic.models.hybrid_dinov2_vit_small_patch16", "_partial_": True, **TINY}
PLAIN = {"_target_": "vit.models.dinov2_vit_small_patch16", "_partial_": True, **TINY}
TIMM = {
    "_target_": "vit.adapters.timm_backbone",
    "_partial_": True,
    "model_name": "vit_tiny_patch16_224",
    **TINY,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve images of two colours, in a folder per colour."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    for colour in ("red", "blue"):
        (root / colour).mkdir()
        for shade in range(6):
            image = Image.new("RGB", (20, 20), colour)
            image.putpixel((shade, shade), (255, 255, 255))
            image.save(root / colour / f"{shade}.png")
    return root


def config(images, folder, backbone, weights=None):
    data = {"_target_": "utils.data.images.ImageFolder", "root": str(images)}
    probe = {
        "_target_": "evaluation.probes.knn.KnnProbe",
        "ks": [3],
        "resize_size": 16,
        "crop_size": 16,
    }
    return {
        "output_dir": str(folder),
        "backbone": backbone,
        "weights": weights,
        "seed": 0,
        "device": "cpu",
        "data": {"train": data, "val": data},
        "probes": {"knn": probe},
    }


@pytest.mark.parametrize(
    "backbone",
    [OCTIC, PLAIN, TIMM, BACKBONES["torchvision"]],
    ids=["octic", "plain", "timm", "torchvision"],
)
def test_any_backbone_is_judged(backbone, images, tmp_path, capsys):
    figures = judge(config(images, tmp_path, backbone))
    assert figures["knn/knn3_top1"] == 100
    printed = capsys.readouterr().out
    assert "judging the random initialisation" in printed
    assert "protocol: class token" in printed
    assert (tmp_path / "knn" / "results_eval_knn.json").exists()
    results = json.loads((tmp_path / "results.json").read_text())["knn"]
    assert results["figures"]["knn3_top1"] == 100
    assert results["protocol"]["weights"] is None


def test_weights_are_loaded_strictly(images, tmp_path):
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
    net = make_net(backbone, None, seed=1)
    file = tmp_path / "run/exported/model.safetensors"
    file.parent.mkdir(parents=True)
    state = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(state, file, {"constructor": json.dumps(backbone)})
    named = {key: value for key, value in backbone.items() if key not in TINY}
    found = make_net(named, str(tmp_path / "run"), seed=2).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    with pytest.raises(UserError, match="without exported"):
        make_net(named, str(tmp_path))


def test_a_mistake_that_shows_late_is_one_line(images, tmp_path):
    """A size that the net cannot take, found when the first image goes through it."""
    wrong = config(images, tmp_path, OCTIC)
    wrong["probes"]["knn"] |= {"resize_size": 20, "crop_size": 20}
    with pytest.raises(UserError, match=r"not a multiple of the patch size 8 \(vit/trunk.py"):
        Job("evaluation.judge.judge", wrong)()


def test_a_net_without_features_is_refused():
    with pytest.raises(UserError, match="no Backbone.*use backbone=timm"):
        make_net({"_target_": "timm.models.resnet18"}, None)


def test_both_splits_are_needed(images, tmp_path):
    wrong = config(images, tmp_path, OCTIC)
    wrong["data"]["val"] = None
    with pytest.raises(UserError, match="data.val is missing"):
        judge(wrong)


WRAPPERS = {
    "symmetrized": {"_target_": "baselines.posthoc.symmetrized.symmetrized"},
    "reduced": {"_target_": "baselines.token_reduction.reduced.reduced", "method": "evit"},
}


def exported(node, folder):
    """A run folder with the weights of a node's net, and the state in it."""
    net = make_net(node, None, seed=1)
    file = folder / "exported/model.safetensors"
    file.parent.mkdir(parents=True)
    state = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(state, file, {"constructor": json.dumps(node)})
    return str(folder), state


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


def test_the_file_says_which_net_where_none_was_named(images, tmp_path, capsys):
    run, _ = exported(PLAIN, tmp_path / "run")
    default = {key: value for key, value in OCTIC.items() if key not in TINY}
    asked = config(images, tmp_path / "out", default, run)
    judge(asked | {"backbone_named": False})
    said = capsys.readouterr().out
    assert f"no --model was given; {run} is of a dinov2_vit_small_patch16" in said
    stored = json.loads((tmp_path / "out/results.json").read_text())["knn"]["protocol"]
    assert stored["backbone"] == "dinov2_vit_small_patch16"
    with pytest.raises(UserError) as raised:
        judge(asked | {"backbone_named": True})
    assert str(raised.value).endswith(
        "these weights are of a dinov2_vit_small_patch16, not a hybrid_dinov2_vit_small_patch16; "
        "--model dinov2_vit_small_patch16"
    )


def test_an_article_fits_its_name(tmp_path):
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="do not fit an OcticVisionTransformer"):
        make_net(OCTIC, str(tmp_path / "w.pth"))


@pytest.mark.parametrize("seed", [None, 7])
def test_the_record_says_the_runs_seed_and_a_probes_own(seed, images, tmp_path):
    asked = config(images, tmp_path, PLAIN) | {"seed": 3}
    probe = {"_target_": "evaluation.probes.linear.LinearProbe", "n_last_blocks": [1], "epochs": 1}
    probe |= {"resize_size": 16, "crop_size": 16, "global_batch_size": 4, "seed": seed or 3}
    judge(asked | {"probes": {"linear": probe}})
    stored = json.loads((tmp_path / "results.json").read_text())["linear"]["protocol"]
    assert (stored["seed"], stored.get("probe_seed")) == (3, seed)


def test_a_file_where_a_probes_folder_belongs_is_refused_before_anything_runs(images, tmp_path):
    (tmp_path / "knn").write_text("")
    with pytest.raises(UserError) as raised:
        judge(config(images, tmp_path, OCTIC))
    assert str(raised.value) == f"output_dir: cannot make {tmp_path}/knn: it is a file"


def test_weights_that_are_not_finite_are_refused(images, tmp_path):
    net = make_net(OCTIC, None)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    state["norm.weight"][0] = torch.nan
    torch.save({"model": state}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w.pth holds weights that are not finite \(norm.weight\)"):
        make_net(OCTIC, str(tmp_path / "w.pth"))


def test_a_probe_that_answers_otherwise_is_named(images, tmp_path):
    asked, probe = config(images, tmp_path, OCTIC), SimpleNamespace(protocol="class token")
    with pytest.raises(UserError, match=r"probes\.mine: its protocol must be a mapping"):
        _report(asked, tmp_path, "mine", {"figure": 1.0}, probe)
    answers = ProbeRunner(
        {"mine": lambda *_, **__: {"figure": [1]}}, nn.Identity(), {}, tmp_path, every=1
    )
    with pytest.raises(UserError, match=r"probes\.mine must return numbers .* figure is \[1\]"):
        answers(1)


class TextProbe:
    """Answers with a word where a number belongs."""

    def __call__(self, net, data, output_dir, step):
        return {"figure": "good"}


def test_an_answer_in_words_is_one_line_and_a_foreign_protocol_is_shown(images, tmp_path):
    asked = config(images, tmp_path, OCTIC)
    asked["probes"] = {"mine": {"_target_": f"{__name__}.TextProbe"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCTIC_PACKAGES", "tests")
        with pytest.raises(UserError, match=r"probes\.mine must return numbers .* is 'good'"):
            judge(asked)
    assert in_words({"size": 32, "kind": "mine"}) == "size: 32; kind: mine"


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
    ],
)
def test_a_title_says_which_weights_were_judged(backbone, path, words):
    assert weights_in_words(backbone, path) == words
