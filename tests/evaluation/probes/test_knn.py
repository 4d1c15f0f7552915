"""The kNN probe from images to files: alone, in two processes, few-shot, and with too large a k."""

import functools
import json
import tempfile

import pytest
from torch.nn.functional import one_hot

from evaluation.features.dataset import extract_features
from evaluation.probes.knn import KnnProbe
from evaluation.probes.neighbours import choose_rows
from tests.evaluation.toys import ToyImages, ToyNet, in_processes, to_tensor

OPTIONS = {"ks": (5, 20), "n_per_class_list": (-1, 3), "num_tries": 2, "batch_size": 16}


def judge(train_length: int = 101, val_length: int = 37, **options) -> dict[str, float]:
    """Figures of the toy net; also what the two processes run."""
    probe = KnnProbe(transform=to_tensor, **{**OPTIONS, **options})
    data = {"train": ToyImages(train_length, 0), "val": ToyImages(val_length, 1)}
    with tempfile.TemporaryDirectory() as output:
        return probe(ToyNet(), data, output, step=3)


def test_toy_classes_are_found():
    figures = judge()
    assert figures["knn5_top1"] > 40  # chance: 17
    assert set(figures) == {
        f"{name}_top{top}" for name in ("knn5", "knn20", "knn3_3_per_class") for top in (1, 5)
    }


def test_figures_are_votes_counted_by_hand():
    """Over all rows, and over a few of each class, whose figure is the mean of the draws."""
    train, val = (
        extract_features(ToyNet(), ToyImages(*size_and_seed), transform=to_tensor, shown=False)
        for size_and_seed in ((101, 0), (37, 1))
    )

    def by_hand(k, rows=slice(None)):
        nearest = (val.features @ train.features[rows].T).topk(k)
        weights = (nearest.values / 0.07).exp()[..., None]
        votes = weights * one_hot(train.labels[rows][nearest.indices], 6)
        return 100 * float((votes.sum(1).argmax(1) == val.labels).float().mean())

    draws = choose_rows(train.labels, [3], n_per_class=3, num_tries=2)
    first, second = (by_hand(3, rows) for rows, _ in draws)
    assert first != second
    found = judge()
    assert found["knn5_top1"] == pytest.approx(by_hand(5))
    assert found["knn20_top1"] == pytest.approx(by_hand(20))
    assert found["knn3_3_per_class_top1"] == pytest.approx((first + second) / 2)


def test_chunks_and_batches_do_not_matter():
    assert judge(chunk_size=13, batch_size=5) == judge()


@pytest.mark.parametrize("train_length", [101, pytest.param(7, marks=pytest.mark.slow)])
def test_two_processes_equal_one(train_length, tmp_path):
    """Also where one rank has fewer rows than k."""
    function = functools.partial(judge, train_length)
    alone = judge(train_length)
    assert in_processes(function, 2, tmp_path) == [alone, alone]


def test_files_hold_lines_and_protocol(tmp_path):
    probe = KnnProbe(transform=to_tensor, ks=(5,))
    figures = probe(ToyNet(), {"train": ToyImages(50, 0), "val": ToyImages(20, 1)}, tmp_path, 8)
    lines = (tmp_path / "results_eval_knn.json").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"('full', 5) Top 1": figures["knn5_top1"]},
        {"('full', 5) Top 5": figures["knn5_top5"]},
    ]
    results = json.loads((tmp_path / "results.json").read_text())["knn"]
    assert results["protocol"]["step"] == 8
    assert results["protocol"]["ks"] == [5]
    assert results["figures"]["('full', 5) Top 1"] == figures["knn5_top1"]


def test_k_beyond_the_training_set_uses_all_and_says_so(capsys):
    figures = judge(train_length=12, n_per_class_list=(-1,))
    assert "k = 20 asked, all 12 training images vote" in capsys.readouterr().out
    assert "knn20_top1" in figures


def test_images_without_labels_are_refused(tmp_path):
    data = {"train": ToyImages(9, 0, labelled=False), "val": ToyImages(9, 1)}
    with pytest.raises(ValueError, match="image 0 of the train set has none"):
        KnnProbe(transform=to_tensor)(ToyNet(), data, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ks": ()}, "at least 1"),
        ({"ks": (0, 5)}, "at least 1"),
        ({"search_precision": "bf16"}, "search_precision must be one of fp32, fp16"),
        ({"precision": "half"}, "precision must be one of fp32, bf16, fp16"),
        ({"n_per_class_list": (0,)}, "-1 means all"),
        ({"num_tries": 0}, "num_tries must be a whole number from 1"),
        ({"chunk_size": 0}, "chunk_size must be a whole number from 1"),
        ({"temperature": 0.0}, "temperature must be finite and above 0"),
    ],
)
def test_wrong_options_are_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        KnnProbe(**options)
