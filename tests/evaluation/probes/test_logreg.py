"""Logistic regression from images to files: alone, in two processes, on any backbone."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from evaluation.features.dataset import FeatureSet, extract_features
from evaluation.probes.knn import KnnProbe
from evaluation.probes.logreg import PUBLISHED_C, LogregProbe, draw_tenth
from tests.evaluation.backbones import IMAGE_SIZE, any_backbone, make
from tests.evaluation.toys import ToyImages, ToyNet, in_processes, to_tensor

CS = [1e-4, 1e-2, 0.3]


def judge(train_length: int = 101, output: str | None = None, **options) -> dict[str, float]:
    """Figures of the toy net; also what the two processes run."""
    probe = LogregProbe(transform=to_tensor, **{"Cs": CS, "batch_size": 16, **options})
    data = {"train": ToyImages(train_length, 0), "val": ToyImages(37, 1)}
    with tempfile.TemporaryDirectory() as folder:
        return probe(ToyNet(), data, Path(output or folder), step=3)


def test_figures_are_scikit_learns(tmp_path):
    """Selection on the tenth of a seeded permutation, refit on all of train, judged on val."""
    data = {"train": ToyImages(101, 0), "val": ToyImages(37, 1)}
    train, val = (
        extract_features(ToyNet(), images, transform=to_tensor, normalized=False, shown=False)
        for images in data.values()
    )
    torch.manual_seed(0)
    held_out = torch.randperm(101)[:10]
    rest = torch.ones(101, dtype=torch.bool)
    rest[held_out] = False

    def fit(C, rows):
        solver = LogisticRegression(C=C, solver="newton-cg", max_iter=2000)
        return solver.fit(train.features[rows].double().numpy(), train.labels[rows].numpy())

    def score(model, part, rows=slice(None)):
        return 100 * model.score(part.features[rows].double().numpy(), part.labels[rows].numpy())

    scores = {C: score(fit(C, rest), train, held_out) for C in CS}
    best = max(CS, key=scores.get)
    figures = judge(output=str(tmp_path))
    assert figures["logreg_C"] == best
    trials = json.loads((tmp_path / "results.json").read_text())["logreg"]["figures"]["selection"]
    assert {trial["C"]: trial["top1"] for trial in trials} == pytest.approx(scores)
    assert figures["logreg_top1"] == pytest.approx(score(fit(best, slice(None)), val))
    assert figures["logreg_top5"] > figures["logreg_top1"] > 40  # chance: 17


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    alone = judge()
    assert in_processes(judge, 2, tmp_path) == [alone, alone]


def test_the_held_out_tenth_is_that_of_the_published_code():
    torch.manual_seed(0)
    expected = torch.randperm(57)[:5].sort().values
    part = FeatureSet(torch.zeros(57, 2), torch.zeros(57), torch.arange(57))
    assert torch.equal(draw_tenth(part).nonzero().flatten(), expected)


def test_published_grid():
    assert len(PUBLISHED_C) == 45
    assert PUBLISHED_C[0] == pytest.approx(1e-6)
    assert PUBLISHED_C[-1] == pytest.approx(1e5)


def test_selection_on_val_and_on_a_data_set_of_its_own():
    on_val = judge(select_on="val")
    each = [judge(select_on="val", Cs=[C])["logreg_top1"] for C in CS]
    assert on_val["logreg_top1"] == max(each)
    assert on_val["logreg_C"] == CS[each.index(max(each))]
    own = judge(finetune=ToyImages(30, 7))
    assert own["logreg_C"] in CS


def test_the_set_that_chose_C_is_learnt_from_in_the_end():
    """Few training images and many others judge as well as all of them together."""
    few, many, val = (
        extract_features(ToyNet(), images, transform=to_tensor, normalized=False, shown=False)
        for images in (ToyImages(11, 0), ToyImages(90, 7), ToyImages(200, 1))
    )
    both = FeatureSet(*(torch.cat(pair) for pair in zip(few, many, strict=True)))
    both = both._replace(indices=torch.arange(101))
    probe = LogregProbe(Cs=[0.3])
    apart, together, alone = (
        probe.evaluate({**parts, "val": val})[0]["logreg_top1"]
        for parts in ({"train": few, "finetune": many}, {"train": both}, {"train": few})
    )
    assert apart == together > alone + 5


def test_what_chooses_C_is_not_learnt_from_meanwhile():
    """Random labels of images fewer than the features can all be learnt, and not foretold."""
    rows = FeatureSet(torch.randn(100, 120), torch.arange(100) % 2, torch.arange(100))
    figures, (trial,), _ = LogregProbe(Cs=[1e3]).evaluate({"train": rows, "val": rows})
    assert figures["logreg_top1"] == 100 and trial.top1 < 100


def test_a_fit_takes_no_more_steps_than_asked(tmp_path):
    def steps(name, **options):
        judge(output=str(tmp_path / name), **options)
        results = json.loads((tmp_path / name / "results.json").read_text())["logreg"]
        return [trial["steps"] for trial in results["figures"]["selection"]]

    assert steps("few", max_iter=2) == [2, 2, 2]
    assert sum(steps("coarse", tol=0.1)) < sum(steps("whole")) / 2


def test_a_class_without_training_images_is_never_right():
    features, labels = 10 * torch.eye(4), torch.arange(4)
    val = FeatureSet(features, labels, torch.arange(4))
    train = FeatureSet(*(part[:3] for part in val))
    figures, *_ = LogregProbe(Cs=[1.0], select_on="val").evaluate({"train": train, "val": val})
    assert figures["logreg_top1"] == 75
    assert KnnProbe(ks=[1]).evaluate(train, val)["full", 1][1] == 75


@pytest.mark.parametrize("options", [{"chunk_size": 7}, {"features_on": "device"}], ids=str)
def test_what_only_changes_speed_changes_no_figure(options):
    assert judge(**options) == judge()


def test_the_mean_over_classes_judges_and_chooses():
    """A class with many images weighs as much as one with few: another C is the best."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 90 + [1] * 10)
    features = torch.randn(100, 3, generator=generator)
    features[labels == 1, 0] += 1.5
    rows = FeatureSet(features, labels, torch.arange(100))
    # The strong penalty leaves but the common class.
    for metric, C, top1 in (("mean_accuracy", 1e-3, 90), ("mean_per_class_accuracy", 1.0, 53.9)):
        probe = LogregProbe(Cs=[1e-3, 1.0], select_on="val", metric_type=metric)
        figures, trials, _ = probe.evaluate({"train": rows, "val": rows})
        assert figures["logreg_C"] == C
        assert figures["logreg_top1"] == pytest.approx(top1, abs=0.1)
        assert max(trial.top1 for trial in trials) == figures["logreg_top1"]


def test_files_hold_lines_and_protocol(tmp_path, capsys):
    figures = judge(output=str(tmp_path), dtype="float32")
    lines = (tmp_path / "results_eval_logreg.txt").read_text().splitlines()
    assert lines == [
        f"Top-1 test accuracy: {figures['logreg_top1']:.1f}",
        f"Top-5 test accuracy: {figures['logreg_top5']:.1f}",
        f"obtained for C = {figures['logreg_C']:.6g}",
    ]
    results = json.loads((tmp_path / "results.json").read_text())["logreg"]
    assert results["protocol"]["step"] == 3
    assert results["protocol"]["dtype"] == "float32"
    assert [trial["C"] for trial in results["figures"]["selection"]] == CS
    printed = capsys.readouterr().out
    assert "logreg: 1/3, C = 0.0001: top-1" in printed
    # A larger C takes longer than those before it: what is left cannot be told.
    assert "left" not in printed


def test_fits_that_stop_short_of_the_optimum_are_told_and_stored(tmp_path, capsys):
    def told(name, **options):
        judge(output=str(tmp_path / name), **options)
        stored = json.loads((tmp_path / name / "results.json").read_text())["logreg"]["figures"]
        said = [line for line in capsys.readouterr().out.splitlines() if "max_iter" in line]
        steps = [trial["steps"] for trial in stored["selection"]]
        return stored["stopped_at_max_iter"], said, steps

    stored, said, _ = told("all", max_iter=2)
    assert stored == {"selection": 3, "judged": True}
    ending = "stopped at max_iter = 2, short of the optimum; the fit that is judged did too"
    assert said == [f"logreg: 3 of 3 C {ending}"]
    stored, said, steps = told("none")
    assert stored == {"selection": 0, "judged": False} and said[0].endswith("is judged did not")
    assert min(steps) < max(steps)
    stored, _, steps = told("some", max_iter=max(steps) - 1)
    assert stored["selection"] == steps.count(max(steps)) == 1


@any_backbone
def test_any_backbone(backbone, tmp_path):
    probe = LogregProbe(Cs=[0.1], resize_size=IMAGE_SIZE, crop_size=IMAGE_SIZE, select_on="val")
    data = {"train": ToyImages(24, 0, num_classes=2), "val": ToyImages(12, 1, num_classes=2)}
    figures = probe(make(backbone), data, tmp_path)
    assert 0 <= figures["logreg_top1"] <= figures["logreg_top5"] == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"Cs": [0.0]}, "Cs must be finite and above 0"),
        ({"Cs": []}, "Cs needs values"),
        ({"select_on": "test"}, "select_on must be one of train, val"),
        ({"metric_type": "per_class_accuracy"}, "known: mean_accuracy, mean_per_class_accuracy"),
        ({"dtype": "fp16"}, "dtype must be one of float64, float32"),
        ({"precision": "half"}, "precision must be one of fp32, bf16, fp16"),
        ({"select_on": "val", "finetune": ToyImages(3, 0)}, "exclude each other"),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        LogregProbe(**options)


def test_images_it_cannot_use_are_refused(tmp_path):
    probe = LogregProbe(transform=to_tensor, Cs=CS)
    data = {"train": ToyImages(30, 0, labelled=False), "val": ToyImages(9, 1)}
    with pytest.raises(ValueError, match="image 0 of the train set has none"):
        probe(ToyNet(), data, tmp_path)
    with pytest.raises(ValueError, match="a tenth of 7 training images is none"):
        judge(7)


def test_config_builds_the_probe():
    from utils.config.build import build
    from utils.config.compose import compose_config

    words = ["+probe@probes.logreg=logreg", "probes.logreg.Cs=[1,2]"]
    config = compose_config("evaluate.yaml", words, base="evaluate")
    probe = build(config.probes.logreg)
    assert isinstance(probe, LogregProbe)
    assert (probe.Cs, probe.resize_size, probe.dtype) == ([1, 2], None, "float64")
    assert probe.protocol["C chosen on"].startswith("a tenth of the training images")
