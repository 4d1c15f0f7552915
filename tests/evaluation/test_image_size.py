"""Images come at the size that a net was built for; published nets stay at 256 and 224."""

import json
from inspect import signature

import pytest

from evaluation.commands.eval_dinov2_classification import parse_evaluation
from evaluation.commands.extract_features import parse_extraction
from evaluation.features.extraction import extract
from evaluation.image_size import image_size_of, probed_at, settle_sizes
from evaluation.judge import judge
from evaluation.nets import make_net
from tests.evaluation.backbones import BACKBONES
from utils.config.build import build, resolve
from utils.config.compose import compose_config
from vit.adapters import timm_backbone
from vit.hub import save_to_folder

PROBES = ("knn", "linear", "logreg", "attentive")
PLAIN = {"_target_": "vit.models.deit_small_patch16_LS", "_partial_": True}
SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TIMM = {"_target_": "vit.adapters.timm_backbone", "model_name": "vit_tiny_patch16_384"}
SWIN = {"_target_": "vit.adapters.timm_backbone", "model_name": "swin_tiny_patch4_window7_224"}


@pytest.mark.parametrize(
    ("node", "size"),
    [
        (PLAIN | SMALL, 224),
        (PLAIN | SMALL | {"img_size": 32}, 32),
        (BACKBONES["octic"], 32),
        (BACKBONES["torchvision"], 32),
        (BACKBONES["timm"], 32),
        (TIMM | {"depth": 1}, 224),  # takes any size, and is judged as ever
        (SWIN | {"depths": [1, 1, 1, 1]}, 224),
        (SWIN | {"depths": [1, 1, 1, 1], "img_size": 448}, 448),
        ({"_target_": "vit.adapters.timm_backbone", "model_name": "resnet18"}, 224),
    ],
)
def test_the_size_that_probes_show_a_net(node, size):
    assert probed_at(make_net(node, None)) == size


@pytest.mark.parametrize("options", [{}, {"img_size": 32}])
def test_a_net_read_from_a_folder_is_shown_the_size_of_the_one_written(options, tmp_path):
    """Though the folder describes it as one for the size that it was built for."""
    options = {"patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2, **options}
    net = timm_backbone("vit_tiny_patch16_224", **options)
    save_to_folder(net, tmp_path, options=options)
    again = timm_backbone(f"local-dir:{tmp_path}")
    assert probed_at(net) == probed_at(again) == options.get("img_size", 224)
    assert image_size_of(net) == image_size_of(again) == options.get("img_size", 224)


@pytest.mark.parametrize(
    "wrapper",
    ["baselines.posthoc.symmetrized.symmetrized", "baselines.token_reduction.reduced.reduced"],
)
@pytest.mark.parametrize("inner", [PLAIN | SMALL | {"img_size": 32}, BACKBONES["timm"], TIMM])
def test_a_net_around_another_one_has_its_size(wrapper, inner):
    inner = inner | {"_partial_": True, "depth": 2}
    options = {"method": "evit"} if "reduced" in wrapper else {}
    net = make_net({"_target_": wrapper, "backbone": inner, "num_classes": 10, **options}, None)
    assert probed_at(net) == inner.get("img_size", 224)


@pytest.mark.parametrize(
    ("node", "size"),
    [
        (TIMM | {"depth": 1}, 384),
        (TIMM | {"depth": 1, "model_name": "vit_small_patch14_dinov2"}, 518),
        (PLAIN | SMALL | {"img_size": 32}, 32),
        (BACKBONES["torchvision"], 32),
        ({"_target_": "vit.adapters.timm_backbone", "model_name": "resnet18"}, 224),
    ],
)
def test_the_size_that_a_net_was_trained_at(node, size):
    """Probes show some of these nets 224 pixels, as they take any size."""
    assert image_size_of(make_net(node, None)) == size


def test_what_is_left_open_is_in_published_proportion():
    published, small = (make_net(PLAIN | SMALL | {"img_size": n}, None) for n in (224, 32))
    assert settle_sizes(published, None, None) == (256, 224)
    assert settle_sizes(published, None, None, margin=False) == (224, 224)
    assert settle_sizes(small, None, None) == (36, 32)
    assert settle_sizes(small, None, None, margin=False) == (32, 32)
    assert settle_sizes(small, 40, None) == (40, 32) and settle_sizes(small, None, 64) == (73, 64)
    assert settle_sizes(small, 50, 48) == (50, 48)


def test_every_probe_leaves_it_open_and_the_flag_sets_it(tmp_path):
    words = [str(tmp_path), "--probes", ",".join(PROBES)]
    probes = parse_evaluation(words)["probes"]
    assert {(probes[name]["resize_size"], probes[name]["crop_size"]) for name in PROBES} == {
        (None, None)
    }
    assert "the net's own size" in build(probes["linear"]).protocol["transform"]
    for name in PROBES:  # called by hand a probe has the defaults of its config
        keywords = signature(resolve(probes[name]["_target_"])).parameters
        assert keywords["resize_size"].default is keywords["crop_size"].default is None
    probes = parse_evaluation([*words, "--input-size", "48", "probes.knn.crop_size=16"])["probes"]
    assert [probes[name]["crop_size"] for name in PROBES] == [16, 48, 48, 48]
    assert parse_extraction([str(tmp_path), "--input-size", "48"])["crop_size"] == 48
    training = compose_config("dinov2/quickstart.yaml")["probes"]
    assert {training[name].crop_size for name in ("knn", "linear")} == {32}


def test_a_net_for_small_images_is_judged_at_them_and_the_protocol_says_so(tmp_path, capsys):
    words = [str(tmp_path), "data=digits", "device=cpu", "--probes", ",".join(PROBES)]
    words += ["--num-workers", "0", "probes.linear.epochs=1", "probes.linear.n_last_blocks=[1]"]
    words += ["probes.logreg.Cs=[1.0]", "probes.logreg.max_iter=1", "probes.attentive.epochs=1"]
    config = parse_evaluation([*words, "probes.attentive.representations=[cls]", "--seed", "3"])
    config["backbone"] = PLAIN | SMALL | {"img_size": 16}
    judge(config)
    stored = json.loads((tmp_path / "results.json").read_text())
    with_margin, without = (f"resize {n}, centre crop 16, bicubic" for n in (18, 16))
    for name in PROBES:
        expected = without if name == "logreg" else with_margin
        assert stored[name]["protocol"]["transform"] == expected, name
        assert stored[name]["protocol"]["seed"] == 3
    assert "crop 16, mirrored" in stored["linear"]["protocol"]["train_transform"]
    assert with_margin in capsys.readouterr().out


def test_features_are_extracted_at_the_nets_own_size(tmp_path, capsys):
    words = [str(tmp_path), "data=digits", "--split", "val", "device=cpu", "num_workers=0"]
    config = parse_extraction(words) | {"backbone": PLAIN | SMALL | {"img_size": 16}}
    meta = json.loads((tmp_path / "val/meta.json").read_text()) if extract(config) else {}
    assert meta["transform"] == "resize 18, centre crop 16, bicubic"
    assert meta["transform"] in capsys.readouterr().out
