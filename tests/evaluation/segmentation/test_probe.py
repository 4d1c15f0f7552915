"""The whole probe on any backbone: files, figures, processes, and mistakes in one line."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import yaml

from evaluation.judge import judge
from evaluation.segmentation.patch_knn import PatchKnn
from evaluation.segmentation.patch_logreg import PatchLogreg
from evaluation.segmentation.patches import label_patches, split_images
from evaluation.segmentation.probe import SegmentationProbe
from tests.evaluation.backbones import any_backbone, make
from tests.evaluation.segmentation.toys import ToyMasks
from tests.evaluation.toys import ToyNet, in_processes
from utils.data.segmentation_transforms import squash
from utils.errors import UserError


def make_probe(**settings):
    settings = {
        "train": ToyMasks(23, seed=1),
        "test": ToyMasks(7, seed=2),
        "knn": PatchKnn(num_neighbors=[1, 3], query_batch=16, chunk_size=50),
        "logreg": PatchLogreg(C=[0.01, 1.0], chunk_size=50, max_iter=100),
        "resolution": 16,
        "batch_size": 4,
        **settings,
    }
    return SegmentationProbe(**settings)


@any_backbone
def test_any_backbone(backbone, tmp_path):
    """Every net is judged; figures, results file and the published file say the same."""
    figures = make_probe(resolution=32)(make(backbone), {}, tmp_path, step=5)
    assert set(figures) == {
        f"{name}_{figure}"
        for name in ("knn", "logreg")
        for figure in ("miou", "acc", "miou_classes")
    }
    assert all(0 <= value <= 100 for value in figures.values())
    assert figures["knn_acc"] > 40  # of four classes
    published = json.loads((tmp_path / "results_eval_segmentation.json").read_text())
    assert list(published["results"])[-2:] == ["labels_knn_mIoU", "labels_knn_acc"]
    assert published["results"]["labels_knn_mIoU"] == figures["knn_miou"] / 100
    config = yaml.safe_load((tmp_path / "config_eval_segmentation.yaml").read_text())
    assert config == published["config"] and config["classifiers"] == ["logreg", "knn"]
    stored = json.loads((tmp_path / "results.json").read_text())["segmentation"]
    protocol = stored["protocol"]
    assert (protocol["world_size"], protocol["step"], protocol["seed"]) == (1, 5, 0)
    assert protocol["precision"] == "fp32" and protocol["ignore_labels"] == [255]
    assert set(stored["figures"]["knn"]["class_iou"]) == {f"class {n}" for n in range(4)}
    chosen = stored["figures"]["knn"]["chosen"]
    val = stored["figures"]["knn"]["val_miou"]
    assert val[chosen] == max(val.values())


def test_file_equals_memory(tmp_path, capsys):
    """Where the features are changes nothing, and no file of them stays."""
    inside = make_probe()(ToyNet(), {}, tmp_path / "a")
    scratch = tmp_path / "scratch"
    outside = make_probe(in_memory_gb=0.0, scratch_dir=str(scratch))(ToyNet(), {}, tmp_path / "b")
    assert inside == outside
    assert f"in files in {scratch}" in capsys.readouterr().out
    assert list(scratch.iterdir()) == []


def test_one_classifier_and_one_point_needs_no_choice(tmp_path):
    knn = PatchKnn(num_neighbors=[1], distances=["cosine"])
    probe = make_probe(train=ToyMasks(5), classifiers=["knn"], knn=knn)
    figures = probe(ToyNet(), {}, tmp_path)
    assert set(figures) == {"knn_miou", "knn_acc", "knn_miou_classes"}
    results = json.loads((tmp_path / "results_eval_segmentation.json").read_text())["results"]
    assert list(results) == ["labels_knn_mIoU", "labels_knn_acc"]


class Part(ToyMasks):
    """Some images of another set, in an order of their own."""

    def __init__(self, whole, order):
        self.pixels, self.masks, self.class_names = (
            whole.pixels[order],
            whole.masks[order],
            whole.class_names,
        )


def test_a_validation_set_of_its_own_chooses(tmp_path):
    """It stands for the tenth that the seed draws, and train is then learnt from whole."""
    whole = ToyMasks(23, seed=1)
    rest, tenth = (Part(whole, order) for order in split_images(23, seed=5))
    apart, own = make_probe(train=rest, val=tenth), make_probe(seed=5)
    assert apart(ToyNet(), {}, tmp_path / "a") == own(ToyNet(), {}, tmp_path / "b")
    results = [
        json.loads((tmp_path / name / "results_eval_segmentation.json").read_text())
        for name in ("a", "b")
    ]
    assert results[0]["results"] == results[1]["results"]
    assert results[0]["config"]["val_dataset_name"] == repr(tenth)
    assert results[1]["config"]["val_dataset_name"] is None
    assert "toy (2 images)" in apart.protocol["selection"]
    one = make_probe(train=Part(whole, range(5)), val=tenth)
    assert len(one(ToyNet(), {}, tmp_path / "c")) == 6


def test_what_chose_is_learnt_from_in_the_end(tmp_path):
    """Two of the four classes are in the validation images alone."""
    sets = {"train": ToyMasks(12, seed=1, num_classes=2), "val": ToyMasks(12, seed=3)}
    figures = make_probe(**sets, logreg=PatchLogreg(C=[1.0]))(ToyNet(), {}, tmp_path)
    assert min(figures["knn_acc"], figures["logreg_acc"]) > 75
    stored = json.loads((tmp_path / "results.json").read_text())["segmentation"]
    assert max(stored["figures"]["knn"]["val_miou"].values()) < 50, "not while they choose"


def test_figures_are_counted_from_the_predictions(tmp_path):
    """By hand, from the files; two of the four classes are in no target. Features stay as asked."""
    test = ToyMasks(7, seed=2, size=16, num_classes=2)
    test.pixels[0] = np.random.RandomState(0).randint(256, size=test.pixels[0].shape)
    logreg = PatchLogreg(C=[1e-4])
    probe = make_probe(
        test=test, logreg=logreg, standardization="none", dump_features=True, dump_predictions=True
    )
    figures = probe(ToyNet(), {}, tmp_path)
    pairs = [squash(test.read(i), test.read_mask(i), 16) for i in range(7)]
    images, masks = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    tokens = ToyNet().eval().features(images)[0].patches
    features = torch.load(tmp_path / "features.pth")["features"]["test"]
    torch.testing.assert_close(features, tokens.flatten(0, 2))
    target = label_patches(masks, 4).flatten(0, 2)
    counted = target != 255
    for name in ("knn", "logreg"):
        found, wanted = torch.load(tmp_path / f"preds_{name}.pth")[counted], target[counted]
        ious = {
            label: float(((found == label) & (wanted == label)).sum())
            / float(((found == label) | (wanted == label)).sum())
            for label in {*found.tolist(), *wanted.tolist()}
        }
        assert figures[f"{name}_acc"] == pytest.approx(
            100 * float((found == wanted).float().mean())
        )
        assert figures[f"{name}_miou"] == pytest.approx(100 * sum(ious.values()) / len(ious))
        assert figures[f"{name}_miou_classes"] == pytest.approx(50 * (ious[0] + ious[1]))
        assert figures[f"{name}_miou"] < figures[f"{name}_miou_classes"] < figures[f"{name}_acc"]


def test_subsampling_is_of_the_patches_of_the_classifier_that_asks(tmp_path, capsys):
    """Of 23 x 16 patches every 400th is the first one."""
    knn = PatchKnn(num_neighbors=[2], distances=["L2"], subsampling=400)
    make_probe(classifiers=["knn"], knn=knn)(ToyNet(), {}, tmp_path)
    assert "k = 2 asked, all 1 training patches vote" in capsys.readouterr().out


def judged_in(folder):
    """Figures; the features, predictions and classifier are left in the folder."""
    probe = make_probe(
        in_memory_gb=0.0, dump_features=True, dump_predictions=True, dump_classifier=True
    )
    return probe(ToyNet(), {}, folder)


@pytest.mark.slow
def test_processes_judge_the_same(tmp_path):
    """Two ranks: the same figures, and the features and predictions of all in one order."""
    alone = judged_in(tmp_path / "one")
    for figures in in_processes(partial(judged_in, tmp_path / "two"), 2, tmp_path):
        assert figures == pytest.approx(alone, abs=0.2)
    names = ["classifier.pth", "features.pth", "preds_knn.pth", "preds_logreg.pth"]
    one, two = ([torch.load(tmp_path / n / name) for name in names] for n in ("one", "two"))
    assert sorted(path.name for path in (tmp_path / "two").glob("*.p*")) == names
    assert list(one[1]) == ["features", "labels"]  # by split within, as published
    for split, features in one[1]["features"].items():
        torch.testing.assert_close(features, two[1]["features"][split])
        assert torch.equal(one[1]["labels"][split], two[1]["labels"][split])
    train = one[1]["features"]["train"]
    assert train.shape == (21 * 16, 6)
    assert abs(train.std(0, unbiased=False) - 1).max() < 1e-4
    assert one[2].shape == (7 * 16, 16)
    for place in (2, 3):
        assert (one[place] == two[place]).float().mean() > 0.99
    torch.testing.assert_close(one[0]["coef_"], two[0]["coef_"], rtol=1e-2, atol=1e-3)


def test_within_a_judgement(tmp_path, capsys):
    """From a config, without data: the probe brings its own; the table has both classifiers."""
    root = str(tmp_path / "data")
    scenes = {"_target_": "utils.data.segmentation.scenes", "root": root}
    node = {
        "_target_": "evaluation.segmentation.probe.SegmentationProbe",
        "train": {**scenes, "split": "val"},
        "test": {**scenes, "split": "val"},
        "classifiers": ["knn"],
        "resolution": 16,
    }
    figures = judge(
        {
            "output_dir": str(tmp_path / "out"),
            "backbone": {
                "_target_": "octic.models.hybrid_dinov2_vit_small_patch16",
                **{"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
            },
            "weights": None,
            "seed": 0,
            "device": "cpu",
            "data": {},
            "probes": {"seg_scenes": node},
        }
    )
    assert "seg_scenes/knn_miou" in figures
    assert "squash to 16 x 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classifiers": ["linear"]}, "classifiers must be one of logreg, knn"),
        ({"classifiers": []}, "classifiers must be a list of logreg, knn"),
        ({"standardization": "zscore"}, "standardization must be one of .*not 'zscore'"),
        ({"precision": "fp8"}, "precision must be one of auto, fp32"),
        ({"feature_dtype": "int8"}, "feature_dtype must be one of fp32"),
        ({"ignore_labels": [-1]}, "ignore_labels lie between 0 and 255"),
    ],
)
def test_mistakes_of_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make_probe(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": ToyMasks(9)}, "there must be 10 or more"),
        ({"resolution": 18}, "not a multiple of the patch size 4"),
        ({"ignore_labels": range(256)}, "every patch mostly has one of them"),
    ],
)
def test_mistakes_of_data(settings, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        make_probe(**settings)(ToyNet(), {}, tmp_path)
    assert "\n" not in str(error.value)
