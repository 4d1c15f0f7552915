"""Counts of correct answers: definitions, addition over ranks, ReaL's labels, and wrong files."""

import json

import pytest
import torch

from evaluation.probes.class_metrics import (
    AnyMatchCounts,
    ClassCounts,
    check_metric,
    make_counts,
    read_real_labels,
)
from tests.evaluation.toys import in_processes
from utils import distributed

HEADS, IMAGES, CLASSES = 3, 40, 7


def draw(classes: int = CLASSES):
    """Scores [H B C] and labels [B] of all classes but the last."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(HEADS, IMAGES, classes, generator=generator)
    return scores, torch.randint(classes - 1, (IMAGES,), generator=generator)


def count_mine() -> list:
    """Fractions of all images, of which this rank counts its own in two updates."""
    scores, labels = draw()
    mine = torch.arange(distributed.rank(), IMAGES, distributed.world_size())
    counts = ClassCounts(HEADS, CLASSES)
    for half in mine.chunk(2):
        counts.add(scores[:, half], labels[half])
    counts.reduce()
    metrics = ("mean_accuracy", "mean_per_class_accuracy", "per_class_accuracy")
    return [[f.tolist() for f in counts.fractions(metric).values()] for metric in metrics]


def test_definitions():
    scores, labels = draw()
    (top1, top5), (macro1, _), (by_class1, by_class5) = count_mine()
    for head in range(HEADS):
        ranks = scores[head].argsort(descending=True)
        for k, micro, by_class in ((1, top1, by_class1), (5, top5, by_class5)):
            hits = (ranks[:, :k] == labels[:, None]).any(1).float()
            assert micro[head] == pytest.approx(hits.mean().item())
            expected = [hits[labels == c].mean().item() for c in range(CLASSES - 1)]
            assert by_class[head] == pytest.approx([*expected, 0.0])
        # The last class has no image, but every head predicts it sometimes, so it counts as 0.
        assert macro1[head] == pytest.approx(sum(by_class1[head]) / CLASSES)


def test_a_class_without_images_counts_for_those_who_predict_it():
    """As in torchmetrics: once is enough, and a classifier that never does is spared."""
    labels = torch.tensor([0, 0, 1])
    answers = torch.tensor([[0, 0, 1], [0, 2, 1]])  # class 2 has no image
    counts = ClassCounts(2, 3)
    counts.add(torch.eye(3)[answers], labels)
    found = counts.fractions("mean_per_class_accuracy")[1]
    assert found.tolist() == pytest.approx([1.0, (1 / 2 + 1 + 0) / 3])


@pytest.mark.parametrize("kind", [ClassCounts, AnyMatchCounts])
def test_one_image_or_none(kind):
    """One image is judged in full; none is 0 rather than a division by zero."""
    counts = kind(1, 2)
    assert counts.fractions()[1].item() == 0
    labels = torch.tensor([1])
    counts.add(torch.tensor([[[0.0, 1.0]]]), labels if kind is ClassCounts else labels[:, None])
    assert counts.fractions()[1].item() == 1


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    alone = count_mine()
    assert in_processes(count_mine, 2, tmp_path) == [alone, alone]


def test_fewer_than_five_classes():
    scores, labels = draw(3)
    counts = make_counts("mean_accuracy", HEADS, 3)
    counts.add(scores, labels)
    assert counts.fractions("mean_accuracy")[5].tolist() == [1.0] * HEADS


def test_one_classifier_agrees():
    scores, labels = draw()
    single, many = AnyMatchCounts(1, CLASSES), ClassCounts(1, CLASSES)
    single.add(scores[:1], labels[:, None])
    many.add(scores[:1], labels)
    assert single.fractions() == many.fractions()


def test_the_first_of_equal_scores_is_the_answer():
    """As in torchmetrics, for every kind of count and however many scores are equal."""
    scores, labels = torch.zeros(1, CLASSES, CLASSES), torch.arange(CLASSES)
    scores[..., -2:] = 1.0
    by_class, several = ClassCounts(1, CLASSES), AnyMatchCounts(1, CLASSES)
    by_class.add(scores, labels)
    several.add(scores, labels[:, None])
    right = [float(label == CLASSES - 2) for label in range(CLASSES)]
    assert by_class.fractions("per_class_accuracy")[1].tolist() == [right]
    assert several.fractions()[1].item() == pytest.approx(1 / CLASSES)


def test_any_of_several_labels_is_right():
    """Images without a label are left out."""
    scores = torch.eye(4)[None]  # image i is taken for class i
    labels = torch.tensor([[0, -1], [3, 1], [3, -1], [-1, -1]])
    counts = AnyMatchCounts(1, 4)
    counts.add(scores[:, :2], labels[:2])
    counts.add(scores[:, 2:], labels[2:])
    counts.reduce()
    assert counts.fractions()[1].item() == pytest.approx(2 / 3)


class Named:
    """The paths of a data set."""

    def __init__(self, *names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def path(self, index):
        return f"val/n0/{self.names[index]}.JPEG"


def test_real_labels_go_by_the_number_in_the_name(tmp_path):
    (tmp_path / "real.json").write_text(json.dumps([[4], [], [7, 9]]))
    images = Named("ILSVRC2012_val_00000003", "ILSVRC2012_val_00000002", "ILSVRC2012_val_00000001")
    labels = read_real_labels(tmp_path / "real.json", images)
    assert labels.tolist() == [[7, 9], [-1, -1], [4, -1]]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("{", "x_1", "real_labels .*Expecting"),
        ('{"a": 1}', "x_1", "must be a JSON list with a list of classes per image"),
        ("[1]", "x_1", "must be a JSON list with a list of classes per image"),
        ("[[-1]]", "x_1", "must be a JSON list with a list of classes per image"),
        ("[[1]]", "x_2", "x_2.JPEG: real_labels holds 1 images"),
        ("[[1]]", "x", "this is none of them"),
    ],
)
def test_wrong_real_labels_are_one_line(content, name, message, tmp_path):
    (tmp_path / "real.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_real_labels(tmp_path / "real.json", Named(name))
    assert "\n" not in str(error.value)


def test_missing_file_and_unknown_metric():
    with pytest.raises(ValueError, match="No such file"):
        read_real_labels("nowhere.json", Named())
    with pytest.raises(ValueError, match="unknown metric 'top1'; known: mean_accuracy"):
        check_metric("top1")
