"""The report says what holds, leaves numbers and pictures, and fails where a law is broken."""

import json
import re

import pytest
import torch
from PIL import Image

from evaluation.commands.equivariance import parse_equivariance
from evaluation.symmetry.equivariance_report import _tolerance, report
from octic.layers import OcticLinear
from tests.evaluation.backbones import BACKBONES, OURS, any_backbone
from utils.results_file import write_results


@pytest.fixture(autouse=True)
def embedded(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("OCTIC_DATA", str(tmp_path_factory.getbasetemp() / "data"))


def config(tmp_path, **changes):
    words = [f"output_dir={tmp_path}", "images=random", "num_images=2", "device=cpu"]
    words += [f"{key}={value}" for key, value in changes.items()]
    return parse_equivariance(words)


def small(tmp_path, backbone, **changes):
    return {**config(tmp_path, angle_step=90.0, **changes), "backbones": {"net": backbone}}


@any_backbone
def test_any_net_is_reported(backbone, tmp_path, capsys):
    figures = report({**small(tmp_path, backbone, dtype="float64"), "shake": 0.1})["net"]
    said = capsys.readouterr().out
    assert len(figures["layers"]) >= 7 and list(figures["angles"]) == ["0", "90", "180", "270"]
    octic = backbone is BACKBONES["octic"]
    claimed = figures["largest error of the law claimed"]
    assert (claimed is not None) == octic
    assert "the law holds to" in said if octic else "net: claims no law" in said
    if octic:
        assert claimed < 1e-10
        assert figures["layers"]["blocks.1 (octic)"]["r"] < 1e-10
    assert figures["layers"]["blocks.2 (plain)"]["r"] > 1e-3
    stored = json.loads((tmp_path / "results.json").read_text())["equivariance"]
    assert stored["figures"]["net"] == figures and stored["protocol"]["dtype"] == "float64"
    for name in ("errors_by_layer.png", "errors_by_angle.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100


def test_without_a_model_every_kind_of_octic_net_is_taken(tmp_path, capsys):
    found = config(tmp_path, image_size=64, angle_step=0.0)
    assert list(found["backbones"]) == ["hybrid", "invariant", "equivariant"]
    for node in found["backbones"].values():
        node |= {"img_size": 64, "embed_dim": 64}
    figures = report(found)
    for kind in figures.values():
        assert kind["largest error of the law claimed"] < 1e-5 and not kind["angles"]
    assert figures["hybrid"]["layers"]["logits"]["r"] > 1e-3
    assert max(figures["invariant"]["layers"]["logits"].values()) < 1e-5
    assert all("plain" not in name for name in figures["equivariant"]["layers"])
    assert "same class" in capsys.readouterr().out


ENCODER = """
from torch.nn.functional import avg_pool2d

def __model_loader__():
    def encode(images):
        found = avg_pool2d(images, 4).movedim(1, -1)
        return found.mean((1, 2)), None, found
    return encode
"""
MIRROR = {
    "_target_": "octic.models.d8_inv_early_deit_small_patch16",
    **OURS,
    "group": "mirror",
    "num_classes": 0,
}
CONVNEXT = {
    "_target_": "baselines.flopping.models.d2_convnext_isotropic_small",
    "_partial_": True,
    "img_size": 32,
    "depths": [2],
    "dims": [32],
}
WRAPPED = {
    "_target_": "baselines.posthoc.symmetrized.symmetrized",
    "_partial_": True,
    "group": "mirror",
    "backbone": {"_target_": "vit.models.deit_tiny_patch16_LS", **OURS},
}
INVARIANT = "invariant: it moves patches alone"


@pytest.mark.parametrize(
    ("backbone", "kinds", "acting"),
    [
        (MIRROR, ["mirror"] * 3 + ["plain"] * 2, "mirror layers: g mixes channels too; plain: it "),
        (CONVNEXT, ["invariant"] * 2, INVARIANT),
        (WRAPPED, ["invariant"] * 4, INVARIANT),
    ],
    ids=["mirror", "convnext", "wrapped"],
)
def test_layers_are_called_what_they_are(backbone, kinds, acting, tmp_path, capsys):
    """By the group that mixes channels; maps of invariants are no octic nor plain layers."""
    figures = report({**small(tmp_path, backbone), "angle_step": 0.0})["net"]
    rows = [name for name in figures["layers"] if "(" in name]
    assert [name.partition("(")[2][:-1] for name in rows] == kinds
    assert acting in " ".join(capsys.readouterr().out.split())
    assert all(figures["layers"][name]["m"] < 1e-5 for name in rows if "plain" not in name)


def test_a_broken_law_is_one_line_and_code_1(tmp_path, capsys, monkeypatch):
    forward = OcticLinear.forward
    monkeypatch.setattr(OcticLinear, "forward", lambda self, *x: forward(self, *x) + 0.1)
    with pytest.raises(SystemExit) as left:
        report(small(tmp_path, BACKBONES["octic"]))
    said = capsys.readouterr()
    assert left.value.code == 1 and said.err.count("\n") == 1
    assert said.err.startswith("error: net breaks its law: relative error ")
    assert (tmp_path / "results.json").is_file(), "what was measured is kept"


def test_a_tolerance_of_zero_is_zero(tmp_path):
    assert _tolerance(config(tmp_path, tolerance=0)) == 0
    assert _tolerance(config(tmp_path)) == 1e-4


def test_a_model_named_replaces_the_kinds(tmp_path):
    assert parse_equivariance(["--model", "vit_tiny_patch16_224"])["backbones"] is None
    found = parse_equivariance(["--model", "dinov2_vit_small_patch16", "--weights", "a b.pth"])
    assert found["weights"] == "a b.pth" and found["backbones"] is None
    assert parse_equivariance(["backbone=torchvision", "--dtype", "float64"])["dtype"] == "float64"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "float16"}, "dtype must be one of float32, float64, not 'float16'"),
        ({"images": "nowhere/at/all"}, "does not exist"),
        ({"num_images": 0}, "num_images must be a whole number from 1, not 0"),
        ({"num_images": None}, "num_images must be a whole number from 1, not None"),
        ({"image_size": 0}, "image_size must be a whole number from 1, not 0"),
        ({"image_size": 1.5}, "image_size must be a whole number from 1, not 1.5"),
        ({"angle_step": 200.0}, "angle_step must lie in [0, 180], not 200.0"),
        ({"angle_step": None}, "angle_step must be a number, not None"),
        ({"shake": float("nan")}, "shake must be finite and at least 0, not nan"),
        ({"shake": -1.0}, "shake must be finite and at least 0, not -1.0"),
        ({"tolerance": "abc"}, "tolerance must be a number, not 'abc'"),
        ({"tolerance": True}, "tolerance must be a number, not True"),
        ({"tolerance": float("inf")}, "tolerance must be finite and at least 0, not inf"),
        ({"tolerance": -1.0}, "tolerance must be finite and at least 0, not -1.0"),
        ({"backbones": "abc"}, "backbones must be a mapping of names to nets, not abc"),
    ],
)
def test_mistakes_are_one_line(changes, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        report(small(tmp_path, BACKBONES["timm"]) | changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model"], "error: --model needs a value"),
        (["--modle", "x"], "error: unknown flag --modle; did you mean '--model'?"),
        (["angle_steps=3"], "error: unknown key 'angle_steps'; did you mean 'angle_step'?"),
        (["stray"], "error: cannot read 'stray'"),
    ],
)
def test_a_bad_command_line_is_one_line_and_code_2(argv, said, capsys):
    with pytest.raises(SystemExit) as left:
        parse_equivariance(argv)
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and error.count("\n") == 1


def test_a_net_that_brings_its_weights_is_not_called_random(tmp_path, capsys):
    file = tmp_path / "encoder.py"
    file.write_text(ENCODER)
    words = ["backbone=file", f"backbone.path={file}", "angle_step=0", "images=random"]
    words += ["image_size=16", "device=cpu", f"output_dir={tmp_path / 'out'}"]
    assert list(report(parse_equivariance(words))) == ["encoder"]
    said = capsys.readouterr().out
    assert "weights: its own" in said and "random initialisation" not in said
    written = json.loads((tmp_path / "out" / "results.json").read_text())["equivariance"]
    assert written["protocol"]["weights"] == "its own"


def test_images_of_a_folder(tmp_path):
    for index in range(3):
        Image.new("RGB", (40, 50), (index * 80, 10, 20)).save(tmp_path / f"{index}.png")
    figures = report(small(tmp_path / "out", BACKBONES["timm"]) | {"images": str(tmp_path)})
    assert figures["net"]["image_size"] == 32
    assert torch.tensor(list(figures["net"]["layers"]["patches, end"].values())).isfinite().all()


def test_every_model_named_has_a_folder_of_its_own(tmp_path, capsys):
    folders = [
        parse_equivariance(words)["output_dir"]
        for words in (
            [],
            ["--model", "dinov2_vit_small_patch16"],
            ["backbone=timm", "backbone.model_name=vit_tiny_patch16_224"],
            ["--model", "dinov2_vit_small_patch16", "output_dir=here"],
        )
    ]
    below = ["", "/dinov2_vit_small_patch16", "/vit_tiny_patch16_224"]
    assert folders == [*(f"runs/equivariance{name}" for name in below), "here"]


def test_what_takes_the_place_of_another_nets_results_says_so(tmp_path, capsys):
    for net, weights in (("a", None), ("a", None), ("b", "w"), ("b", "v")):
        protocol = {"backbone": {"_target_": f"vit.models.{net}"}, "weights": weights}
        write_results(tmp_path, "equivariance", protocol=protocol, figures={})
    said = capsys.readouterr().out.splitlines()
    assert [line.partition("results of ")[2] for line in said] == [
        "a, weights: None",
        "b, weights: w",
    ]


def test_no_picture_of_angles_outlives_its_results(tmp_path, monkeypatch):
    drawn = "evaluation.symmetry.equivariance_report.draw_layer_errors"
    monkeypatch.setattr(drawn, lambda rows, path, dtype: path)
    old = tmp_path / "errors_by_angle.png"
    old.write_bytes(b"of another net")
    report({**small(tmp_path, BACKBONES["timm"]), "angle_step": 0.0})
    assert (tmp_path / "results.json").is_file() and not old.exists()


def test_damaged_results_are_set_aside(tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"knn": ')
    write_results(tmp_path, "x", protocol={}, figures={"y": 1})
    assert json.loads((tmp_path / "results.json").read_text())["x"]["figures"] == {"y": 1}
    assert (tmp_path / "results.damaged").read_text() == '{"knn": '
    assert "is damaged: set aside as results.damaged" in capsys.readouterr().out
