"""The command line of DINOv2's classification evaluation is understood as it stands."""

import sys

import pytest

from evaluation.arguments import parse_evaluation, read_evaluation_arguments
from utils.errors import UserError

PUBLISHED = [
    *("OUT", "--config-file", "configs/eval/hybrid_vith16.yaml"),
    *("--pretrained-weights", "w's.pth", "--gather-on-cpu"),
    *("--train-dataset", "ImageNet:split=TRAIN:root=a"),
    *("--val-dataset", "ImageNet:split=VAL:root=a"),
    *("--nb_knn", "5", "50", "--temperature", "0.1", "--batch-size", "32"),
    *("--n-per-class-list", "-1", "5", "--n-tries", "3"),
]


def test_published_command():
    config = parse_evaluation(PUBLISHED)
    knn = config["probes"]["knn"]
    assert config["output_dir"] == "OUT"
    assert config["weights"] == "w's.pth"
    assert config["backbone"]["_target_"] == "octic.models.hybrid_dinov2_vit_huge_patch16"
    assert (knn["ks"], knn["temperature"], knn["batch_size"]) == ([5, 50], 0.1, 32)
    assert (knn["n_per_class_list"], knn["num_tries"]) == ([-1, 5], 3)
    assert config["data"]["val"] == {
        "_target_": "utils.data.strings.parse_dataset",
        "string": "ImageNet:split=VAL:root=a",
    }


def test_our_own_style(capsys):
    words = ["backbone=timm", "backbone.model_name=vit_tiny_patch16_224", "probes.knn.ks=[7]"]
    config = parse_evaluation([*words, "output_dir=x", "--device", "cpu"])
    assert config["backbone"]["_target_"] == "vit.adapters.timm_backbone"
    assert config["probes"]["knn"]["ks"] == [7]
    assert config["device"] == "cpu"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b"], "two output folders, 'a' and 'b'"),
        (["--nb_knn", "ten"], "--nb_knn takes int, not 'ten'"),
        (["--temperature"], "--temperature needs a value"),
        (["--epochs", "10"], "--epochs belongs to the linear probe, which is not built yet"),
    ],
)
def test_mistakes_are_one_line(words, message):
    with pytest.raises(UserError, match=message):
        read_evaluation_arguments(words)


def test_mistake_leaves_with_code_2(capsys):
    with pytest.raises(SystemExit) as left:
        parse_evaluation(["--nb_kn", "10"])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_help_names_the_flags(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval_dinov2_classification.py", "--help"])
    with pytest.raises(SystemExit) as left:
        parse_evaluation()
    assert left.value.code == 0
    assert "--nb_knn" in capsys.readouterr().out
