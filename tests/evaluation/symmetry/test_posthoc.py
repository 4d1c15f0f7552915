"""The post-hoc experiment: its flags, its split, and files that other judges read."""

import csv
import json

import numpy as np
import pytest
import torch

from evaluation.commands.posthoc import parse_posthoc, read_posthoc_arguments
from evaluation.nets import complete, make_classifier, make_net
from evaluation.probes.accuracy import AccuracyProbe
from evaluation.symmetry.posthoc import (
    ALONE,
    CSV_COLUMNS,
    compare_aggregators,
    load_classifier,
    make_transform,
    split_data,
)
from utils.data.embedded import digits
from utils.errors import UserError
from utils.symmetry import SYMMETRIES
from vit.adapters import TimmBackbone
from vit.weights import read_metadata, read_state

TINY = ["backbone.img_size=32", "backbone.patch_size=16", "backbone.embed_dim=16"]
TINY += ["backbone.depth=1", "backbone.num_heads=4", "--device", "cpu"]


def config(*words: str) -> dict:
    return parse_posthoc([*TINY, *words])


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--n_rotations", "16"], ["wrapper.group=C16"]),
        (["--n_rotations=4", "--flips"], ["wrapper.group=D4"]),
        (["--flips"], ["wrapper.group=D4"]),
        (["--model_path", "x.pt"], ["weights='x.pt'"]),
        (["--finetune_model"], ["trained=all"]),
        (["--finetune_mlp_head"], ["trained=head"]),
        (["--only_3_and_8"], ["classes=[3,8]"]),
        (["--less_data"], ["data_share=0.1"]),
        (["--pcam"], ["backbone=posthoc_vit_pcam", "data=pcam"]),
        (["--aggregators", "mean, max"], ["aggregators=['mean','max']"]),
        (["--model", "posthoc_vit_mnist"], ["backbone=posthoc_vit_mnist"]),
    ],
)
def test_the_published_flags_are_keys(words, meant):
    assert read_posthoc_arguments(words) == meant


def test_validation_comes_from_the_training_images_and_follows_the_seed():
    parts = split_data(config("data_share=0.5"))
    again = split_data(config("data_share=0.5"))
    used, held = (set(part.indices.tolist()) for part in (parts.train, parts.validation))
    total = len(digits(split="train"))
    assert not used & held and len(held) == round(0.1 * total)
    assert len(used) == round(0.5 * (total - len(held)))
    assert np.array_equal(parts.train.indices, again.train.indices)
    assert len(parts.test) == len(digits(split="val"))


def test_a_validation_set_of_its_own_leaves_the_training_images_whole():
    """Rotated MNIST has one: then every training image is trained on."""
    held = {"_target_": "utils.data.embedded.digits", "split": "val"}
    parts = split_data({**config("--only_3_and_8"), "validation": held})
    whole = split_data(config("--only_3_and_8"))
    assert len(parts.train) == len(whole.train) + len(whole.validation)
    assert len(parts.validation) == len(parts.test) and set(parts.validation.labels) == {3, 8}


def test_two_digits_keep_their_labels():
    parts = split_data(config("--only_3_and_8"))
    assert set(parts.test.labels.tolist()) == {3, 8} == set(parts.train.labels.tolist())
    with pytest.raises(UserError, match=r"classes=\[3, 11\]: .* has no image of class 11$"):
        split_data(config("classes=[3,11]"))
    with pytest.raises(UserError, match=r"classes=\[3\] leaves one class"):
        split_data(config("classes=[3]"))
    with pytest.raises(UserError, match="leave nothing to validate or to train on"):
        split_data(config("validation_share=0.0"))


def test_the_workers_read_for_the_trainings_too():
    assert config("num_workers=3")["training"]["num_workers"] == 3
    assert config("training.weight_decay=0.1")["training"]["num_workers"] == 0


def test_a_net_of_one_channel_gets_grey_images():
    net = torch.nn.Module()
    net.in_chans, net.img_size = 1, (28, 28)
    transform = make_transform({"image_size": None, "mean": [0.1307], "std": [0.3081]}, net)
    image = transform(digits(split="val").read(0))
    assert image.shape == (1, 28, 28) and float(image.min()) == pytest.approx(-0.4242, abs=0.05)
    with torch.device("meta"):
        grey = TimmBackbone("resnet18", in_chans=1)
    told = {"image_size": 32, "mean": None, "std": None}
    assert make_transform(told, grey)(digits(split="val").read(0)).shape == (1, 32, 32)


def test_a_table_a_csv_and_nets_that_other_judges_load(tmp_path, capsys):
    """Eight symmetries, one accuracy; the trained wrapper comes back from its file alone."""
    words = [f"output_dir={tmp_path}", "training.epochs=1", "validation_share=0.05"]
    words += ["data_share=0.1", "aggregators=[mean,most_probable,learned_score]"]
    figures = compare_aggregators(config(*words))
    assert list(figures) == ["backbone alone", "mean", "most_probable", "learned_score"]
    for name in ("mean", "most_probable", "learned_score"):
        row = figures[name]
        # An image whose two best logits are one rounding apart may fall either way.
        assert row["test_worst_symmetry"] == pytest.approx(row["test"], abs=0.6)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == CSV_COLUMNS and [row[0] for row in rows[1:]] == list(figures)
    written = json.loads((tmp_path / "results.json").read_text())["posthoc"]
    assert written["figures"]["mean"]["test"] == figures["mean"]["test"]
    said = capsys.readouterr().out
    assert "worst symmetry" in said
    assert "no weights given (--weights FILE): judging the random initialisation" in said
    assert "deit_small_patch16_LS, weights: random initialisation; test:" in said
    path = tmp_path / "learned_score.safetensors"
    node = {
        "_target_": "baselines.posthoc.symmetrized.symmetrized",
        "backbone": {"_target_": "vit.models.deit_small_patch16_LS", "_partial_": True},
    }
    state = read_state(path)
    whole = complete(node, read_metadata(path), state, digits(split="val"))
    net = make_classifier(whole, state, str(path), seed=0)
    assert net.aggregator_name == "learned_score" and net.num_classes == 10


def test_a_net_of_no_law_has_a_worst_symmetry(tmp_path):
    """Upright, mean and worst accuracy are those that the accuracy probe counts."""
    words = [f"weights={tmp_path}/net.pt", f"output_dir={tmp_path}", "aggregators=[mean]"]
    asked = config("--only_3_and_8", *words)
    parts = split_data(asked)
    net = load_classifier({**asked, "weights": None}, parts.test)[1]
    for parameter in net.parameters():
        parameter.data += torch.randn_like(parameter)
    net.head.bias.data[[3, 8]] += 4  # the two that there are
    torch.save(net.state_dict(), tmp_path / "net.pt")
    alone = compare_aggregators(asked)[ALONE]
    probe = AccuracyProbe(symmetries=True, transform=make_transform(asked, net))
    counted, held = (probe(net, {"val": part}, tmp_path) for part in (parts.test, parts.validation))
    each = [counted["acc1" if name == "e" else f"{name}_acc1"] for name in SYMMETRIES]
    assert min(each) < each[0] != sum(each) / 8
    assert alone["test"] == pytest.approx(each[0])
    assert alone["test_symmetries"] == pytest.approx(sum(each) / 8)
    assert alone["test_worst_symmetry"] == pytest.approx(min(each))
    assert alone["validation"] == pytest.approx(held["acc1"])


def test_weights_of_a_classifier_alone_are_judged_under_a_wrapper(tmp_path):
    """The file names the plain net; the wrapper's node is completed by it."""
    from safetensors.torch import save_file

    plain = {"_target_": "vit.models.deit_small_patch16_LS", "num_classes": 10, "img_size": 32}
    plain |= {"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 4}
    net = make_net(plain, None)
    path = tmp_path / "plain.safetensors"
    save_file(net.state_dict(), path, {"constructor": json.dumps(plain)})
    node = {
        "_target_": "baselines.posthoc.symmetrized.symmetrized",
        "backbone": {"_target_": "vit.models.deit_small_patch16_LS", "_partial_": True},
    }
    state = read_state(path)
    whole = complete(node, read_metadata(path), state, digits(split="val"))
    judged = make_classifier(whole, state, str(path), seed=0)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(judged(x), judged(x.rot90(1, (-2, -1))), rtol=1e-4, atol=1e-6)
    assert torch.equal(judged.model.head.weight, net.head.weight)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--group", "C4", "--n_rotations", "8"], "--group C4 and --n_rotations 8 both say"),
        (["--flips", "wrapper.group=D4"], "--group D4 and --flips both say"),
    ],
)
def test_two_words_for_the_group_are_refused(words, said):
    with pytest.raises(UserError, match=said):
        read_posthoc_arguments(words)


@pytest.mark.parametrize(("words", "code"), [(["aggregators=[meann]"], 2), ([], 0)])
def test_check_builds_the_aggregators(words, code, tmp_path, capsys):
    words = [*words, f"output_dir='{tmp_path}'", "weights=/nowhere.pth", "--check"]
    with pytest.raises(SystemExit) as left:
        config(*words)
    told = capsys.readouterr()
    assert left.value.code == code and ("did you mean 'mean'" in told.err) == bool(code)
    assert ("there is no /nowhere.pth on this machine" in told.out) != bool(code)


def test_a_validation_set_that_is_none_is_a_mistake():
    with pytest.raises(UserError, match="validation must be a data set"):
        split_data(config("validation=val"))
