"""Accuracy is counted as DeiT counts it, by any number of processes and under any symmetry."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evaluation.probes.accuracy import AccuracyProbe, figures_of, judge_images
from octic.vision_transformer import OcticVisionTransformer
from tests.evaluation.toys import Damaged, ToyImages, in_processes, to_tensor
from utils.config.compose import compose_config
from utils.data.images import Subset
from utils.errors import UserError
from utils.probing import ProbeRunner
from utils.symmetry import SYMMETRIES
from vit.adapters import TimmBackbone

OPTIONS = {"transform": to_tensor, "batch_size": 4}


class ToyClassifier(nn.Module):
    """Logits that look at the left half of the image alone, so that mirroring matters."""

    embed_dim, patch_size, img_size = 6, 4, (8, 8)

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(3 * 8 * 4, classes)
        self.dropout = nn.Dropout(0.9)
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.dropout(self.head(images[..., :4].flatten(1)))


def by_hand(net: nn.Module, images: ToyImages, turn: int = 0, mirror: bool = False) -> dict:
    """Top-1, top-5, DeiT's loss and predictions, in plain terms."""
    correct, correct5, losses, predictions = 0, 0, [], []
    order = range(len(images))
    for start in range(0, len(images), 4):
        rows = [i for i in order if start <= i < start + 4]
        x = torch.stack([to_tensor(images.read(i)) for i in rows]).rot90(turn, (-2, -1))
        logits = net(x.flip(-1) if mirror else x).detach()
        labels = torch.tensor([images.label(i) for i in rows])
        losses.append(float(nn.functional.cross_entropy(logits, labels)))
        ranking = logits.argsort(dim=1, descending=True)
        correct += int((ranking[:, 0] == labels).sum())
        correct5 += int((ranking[:, :5] == labels[:, None]).sum())
        predictions += ranking[:, 0].tolist()
    n = len(images)
    return {
        "acc1": 100 * correct / n,
        "acc5": 100 * correct5 / n,
        "loss": float(np.mean(losses)),
        "predictions": predictions,
    }


def test_figures_are_those_counted_by_hand(tmp_path, capsys):
    """Ten images in batches of four: the short last batch counts as much as the others."""
    net, images = ToyClassifier().eval(), ToyImages(10, seed=2)
    found = AccuracyProbe(**OPTIONS)(net, {"val": images}, tmp_path)
    expected = by_hand(net, images)
    for key in ("acc1", "acc5", "loss"):
        assert found[key] == pytest.approx(expected[key], abs=1e-5), key
    assert abs(found["image_loss"] - found["loss"]) > 1e-4
    printed = capsys.readouterr().out
    line = f"* Acc@1 {found['acc1']:.3f} Acc@5 {found['acc5']:.3f} loss {found['loss']:.3f}"
    assert line in printed.splitlines()
    assert f"Accuracy of the network on the 10 test images: {found['acc1']:.1f}%" in printed


def test_the_figures_lie_beside_their_protocol(tmp_path):
    """A training run has no other place that says how they were counted."""
    net, images = ToyClassifier().eval(), ToyImages(10, seed=2)
    probes = {"accuracy": AccuracyProbe(**OPTIONS)}
    found = ProbeRunner(probes, net, {"val": images}, tmp_path)(7)
    written = json.loads((tmp_path / "accuracy/results.json").read_text())["accuracy"]
    assert {f"accuracy/{key}": value for key, value in written["figures"].items()} == found
    assert (written["protocol"]["step"], written["protocol"]["probe"]) == (7, "accuracy")
    assert written["protocol"]["data"] == repr(images)
    AccuracyProbe(**OPTIONS)(net, {"val": images}, tmp_path / "evaluation")
    assert not (tmp_path / "evaluation").exists()  # that writes it with the name of the net


def test_the_size_is_what_the_net_was_built_for(tmp_path):
    """timm's description of a net built at another size keeps telling the registered one."""
    size = {"img_size": 32, "dynamic_img_size": False}  # which takes no other
    net = TimmBackbone("vit_tiny_patch16_224", depth=1, num_classes=6, **size)
    assert AccuracyProbe()(net, {"val": ToyImages(2, seed=2)}, tmp_path)["acc5"] >= 0


def test_the_protocol_tells_the_transform_that_was_given():
    assert "central crop" in AccuracyProbe().protocol["transform"]
    assert "to_tensor" in AccuracyProbe(**OPTIONS).protocol["transform"]


@pytest.mark.parametrize("training", [True, False])
def test_the_net_is_left_as_it_was(training, tmp_path):
    net = ToyClassifier().train(training)
    AccuracyProbe(**OPTIONS)(net, {"val": ToyImages(4, seed=2)}, tmp_path)
    assert net.training == training and net.dropout.training == training


def test_table_of_all_symmetries(tmp_path, capsys):
    net, images = ToyClassifier().eval(), ToyImages(10, seed=2)
    found = AccuracyProbe(symmetries=True, **OPTIONS)(net, {"val": images}, tmp_path)
    upright = by_hand(net, images)["predictions"]
    for name, (turns, mirrored) in SYMMETRIES.items():
        expected = by_hand(net, images, turns, mirrored)
        prefix = "" if name == "e" else f"{name}_"
        assert found[f"{prefix}acc1"] == pytest.approx(expected["acc1"]), name
        assert found[f"{prefix}loss"] == pytest.approx(expected["loss"], abs=1e-5), name
        if name != "e":
            changed = sum(map(int.__ne__, expected["predictions"], upright))
            assert found[f"{name}_changed"] == changed, name
    assert "predictions changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "name", "elements", "calls"),
    [
        ({"flop_eval": True}, "flop", ["m"], 2),
        ({"rot_eval": True}, "rot", ["e", "r", "rr", "rrr"], 4),
        ({"rot_eval": True, "flop_eval": True}, "rot_flop", ["m", "mr", "mrr", "mrrr"], 8),
    ],
)
def test_published_options(options, name, elements, calls, tmp_path):
    """Each image under one of the symmetries, in one pass over the files."""
    net, images = ToyClassifier().eval(), ToyImages(200, seed=2)
    found = AccuracyProbe(**{**OPTIONS, "batch_size": 200}, **options)(
        net, {"val": images}, tmp_path
    )
    assert net.calls == calls
    means = [found["acc1" if e == "e" else f"{e}_acc1"] for e in elements]
    assert min(means) - 8 < found[f"{name}_acc1"] < max(means) + 8
    if name == "flop":
        assert found["flop_acc1"] == found["m_acc1"]
    else:  # neither of the four alone
        losses = {found["loss" if e == "e" else f"{e}_loss"] for e in elements}
        assert found[f"{name}_loss"] not in losses
    again = AccuracyProbe(**{**OPTIONS, "batch_size": 50}, **options)(
        net, {"val": images}, tmp_path
    )
    assert again[f"{name}_acc1"] == found[f"{name}_acc1"], "the draw depends on the image alone"


@pytest.mark.parametrize("invariant", [True, False])
def test_an_invariant_model_loses_no_prediction(invariant, tmp_path):
    torch.manual_seed(0)
    net = OcticVisionTransformer(
        img_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=6,
        invariant=invariant, init_values=1.0,
    )  # fmt: skip
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    found = AccuracyProbe(symmetries=True, transform=to_tensor)(
        net, {"val": ToyImages(60, seed=2)}, tmp_path
    )
    changed = [value for key, value in found.items() if key.endswith("_changed")]
    assert len(changed) == 7
    assert (sum(changed) == 0) == invariant


def in_two(folder: Path) -> dict:
    found = AccuracyProbe(symmetries=True, transform=to_tensor, batch_size=4)(
        ToyClassifier(), {"val": ToyImages(11, seed=2)}, folder
    )
    return found


def test_two_processes_say_what_one_says(tmp_path):
    """The loss too, though they share the images out otherwise than in batches of one process."""
    alone = in_two(tmp_path)
    for found in in_processes(partial(in_two, tmp_path), 2, tmp_path):
        assert found == pytest.approx(alone)


def more_processes_than_images(folder: Path) -> dict:
    return AccuracyProbe(transform=to_tensor)(
        ToyClassifier(), {"val": ToyImages(1, seed=2)}, folder
    )


@pytest.mark.slow
def test_a_process_may_have_no_image(tmp_path):
    alone = more_processes_than_images(tmp_path)
    for found in in_processes(partial(more_processes_than_images, tmp_path), 2, tmp_path):
        assert found == pytest.approx(alone)


def test_fewer_than_five_classes(tmp_path):
    found = AccuracyProbe(**OPTIONS)(
        ToyClassifier(3), {"val": ToyImages(9, seed=2, num_classes=3)}, tmp_path
    )
    assert found["acc5"] == 100


def test_classes_need_no_names(tmp_path):
    """Then the net's logits say how many there are, and labels must be among them."""
    named, bare = ToyImages(9, seed=2), ToyImages(9, seed=2)
    bare.class_names = []
    probe = AccuracyProbe(**OPTIONS)
    found, expected = (probe(ToyClassifier(), {"val": x}, tmp_path) for x in (bare, named))
    assert found == expected
    with pytest.raises(UserError, match="the net tells 3 classes apart"):
        probe(ToyClassifier(3), {"val": bare}, tmp_path)


def test_mistakes_are_one_line(tmp_path):
    probe, images = AccuracyProbe(**OPTIONS), ToyImages(6, seed=2)
    with pytest.raises(UserError, match="the net tells 7 classes apart, .* has 6"):
        probe(ToyClassifier(7), {"val": images}, tmp_path)
    with pytest.raises(UserError, match="gives no logits"):
        probe(nn.Unflatten(1, (3, 1)), {"val": images}, tmp_path)
    with pytest.raises(UserError, match="no image"):
        probe(ToyClassifier(), {"val": Subset(images, [])}, tmp_path)
    other = ToyImages(6, seed=2)
    other.class_names = other.class_names[::-1]
    with pytest.raises(UserError, match="data.val has other classes than data.train: class 0 was"):
        probe(ToyClassifier(), {"train": other, "val": images}, tmp_path)
    images.labels = -np.ones(6, dtype=np.int64)
    with pytest.raises(UserError, match="without labels"):
        probe(ToyClassifier(), {"val": images}, tmp_path)
    with pytest.raises(ValueError, match="precision must be one of .*not 'fp8'"):
        AccuracyProbe(precision="fp8")
    with pytest.raises(ValueError, match="input_size must be a whole number from 1, not 0"):
        AccuracyProbe(input_size=0)


def test_an_image_that_is_left_out_changes_no_other(tmp_path):
    """Not even the turn that is drawn for it."""
    net, damaged, whole = ToyClassifier(), Damaged(50, seed=2), ToyImages(50, seed=2)
    rest = Subset(whole, [index for index in range(50) if index % 5 != 4])
    skipping = AccuracyProbe(**OPTIONS, on_error="skip", rot_eval=True)
    found = skipping(net, {"val": damaged}, tmp_path)
    expected = AccuracyProbe(**OPTIONS, symmetries=True)(net, {"val": rest}, tmp_path)
    views = {key: value for key, value in expected.items() if key[0] != "m"}
    assert {key: found[key] for key in views} == pytest.approx(views)
    outcomes = judge_images(net, whole, elements=skipping.elements, transform=to_tensor)
    drawn = skipping._as_published(outcomes, len(whole))
    hits = [bool(drawn.places[index] < 1) for index in range(50) if index % 5 != 4]
    assert found["rot_acc1"] == pytest.approx(100 * np.mean(hits))
    with pytest.raises(UserError, match="toy 4: damaged"):
        AccuracyProbe(**OPTIONS)(net, {"val": damaged}, tmp_path)


def test_a_training_that_skips_images_skips_those_of_its_probe():
    config = compose_config("deit/quickstart.yaml", ["recipe.on_error=skip"])
    assert config["probes"]["accuracy"]["on_error"] == "skip"


def test_outcomes_stand_in_the_order_of_the_images():
    images = ToyImages(10, seed=2)
    found = judge_images(ToyClassifier(), images, transform=to_tensor, batch_size=3)["e"]
    assert found.predictions.tolist() == by_hand(ToyClassifier().eval(), images)["predictions"]
    assert figures_of(found, found, batch_size=4).changed == 0
