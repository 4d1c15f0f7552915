"""One call judges any net: ours from an exported file, timm's by name; wrong files are refused."""

import json
from types import SimpleNamespace

import pytest
from torch import nn

from evaluation.judge import _report, build_probes, judge
from evaluation.results import in_words
from slurm.job import Job
from tests.evaluation.backbones import BACKBONES, OCTIC, PLAIN, TIMM, TINY, exported
from utils.errors import UserError
from utils.probing import ProbeRunner


@pytest.mark.parametrize("node", [5, 0, "knn", True, []])
def test_what_is_no_probe_is_refused(node):
    assert build_probes({"probes": {"knn": None}}) == {}
    with pytest.raises(UserError, match="probes.knn must be {_target_: ...}, or null, not "):
        build_probes({"probes": {"knn": node}})


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


def test_a_mistake_that_shows_late_is_one_line(images, tmp_path):
    """A size that the net cannot take, found when the first image goes through it."""
    wrong = config(images, tmp_path, OCTIC)
    wrong["probes"]["knn"] |= {"resize_size": 20, "crop_size": 20}
    sizes = r"not a multiple of the patch size 8; 16 x 16 and 24 x 24 are \(vit/backbone.py"
    with pytest.raises(UserError, match=sizes):
        Job("evaluation.judge.judge", wrong)()


def test_both_splits_are_needed(images, tmp_path):
    wrong = config(images, tmp_path, OCTIC)
    wrong["data"]["val"] = None
    with pytest.raises(UserError, match="data.val is missing"):
        judge(wrong)


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
