"""The patch classifier equals scikit-learn's, held or read anew, on one process or several."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from evaluation.segmentation.fit_rows import FitRows
from evaluation.segmentation.patch_logreg import PUBLISHED_C, PatchLogreg
from evaluation.segmentation.standardize import Standardizer
from tests.evaluation.segmentation.toys import make_store, random_patches
from tests.evaluation.toys import in_processes

CPU = torch.device("cpu")
TRAIN, TEST = random_patches(120, seed=1), random_patches(24)


def fitted(**settings):
    rows = FitRows(
        [make_store(*TRAIN, per_image=4)],
        ignore_labels=[3],
        standardizer=Standardizer(),
        chunk_size=50,
    )
    logreg = PatchLogreg(C=[0.5], **settings)
    test = make_store(*TEST, per_image=4)
    (key,) = logreg.points
    parts = list(logreg.fit_and_predict(rows, test, key, device=CPU))
    numbers = test.numbers(torch.arange(test.num_rows))
    labels = torch.cat([labels for _, labels in parts])
    return logreg.fitted, dict(zip(numbers.tolist(), labels.tolist(), strict=True))


@pytest.mark.parametrize("hold_gb", [None, 0.0])
def test_equals_sklearn(hold_gb):
    found, predictions = fitted(hold_gb=hold_gb)
    labels = TRAIN[1].mode(1).values
    keep = labels != 3
    theirs = LogisticRegression(C=0.5, tol=1e-10, max_iter=5000)
    theirs.fit(TRAIN[0][keep].numpy(), labels[keep].numpy())
    assert found["classes_"].tolist() == theirs.classes_.tolist()
    centred = found["coef_"] - found["coef_"].mean(0)
    torch.testing.assert_close(
        centred.double(), torch.from_numpy(theirs.coef_).double(), rtol=1e-2, atol=1e-3
    )
    patch_labels = theirs.predict(TEST[0].numpy())
    assert [predictions[n] for n in range(24)] == [[int(label)] * 9 for label in patch_labels]


def _coefficients():
    return fitted()[0]["coef_"].tolist()


@pytest.mark.slow
def test_processes_fit_the_same(tmp_path):
    alone = torch.tensor(_coefficients())
    for rank in in_processes(_coefficients, 2, tmp_path):
        torch.testing.assert_close(torch.tensor(rank), alone, rtol=1e-3, atol=1e-4)


def test_warm_start_leads_to_the_same():
    rows = FitRows([make_store(*TRAIN)], ignore_labels=[3], standardizer=Standardizer())
    test = make_store(*TEST)
    grids = [
        PatchLogreg(C=[1e-3, 1e-1, 10.0], warm_start=warm).score(rows, test, device=CPU)
        for warm in (False, True)
    ]
    for key, score in grids[0].items():
        assert grids[1][key].acc == pytest.approx(score.acc, abs=0.02)


def test_float64_reaches_the_optimum():
    """There, the objective's derivative by the weights is zero: W = C sum_i (y_i - p_i) x_i."""
    rows = FitRows([make_store(*TRAIN)], ignore_labels=[3], standardizer=Standardizer())
    logreg, test = PatchLogreg(C=[50.0], dtype="float64"), make_store(*TEST)
    for _ in logreg.fit_and_predict(rows, test, *logreg.points, device=CPU):
        pass
    labels = TRAIN[1].mode(1).values
    keep = labels != 3
    features, right = TRAIN[0][keep].double(), labels[keep, None] == logreg.fitted["classes_"]
    weight, bias = (logreg.fitted[name].double() for name in ("coef_", "intercept_"))
    chances = (features @ weight.T + bias).softmax(1)
    expected = 50 * (right.double() - chances).T @ features
    torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", [{"max_iter": 2}, {"tol": 0.1}, {"history": 1}], ids=str)
def test_a_setting_reaches_the_fit(change):
    one, other = (fitted(**{"max_iter": 9, **more})[0]["coef_"] for more in ({}, change))
    assert (one - other).abs().max() > 1e-4


def test_published_grid():
    assert list(map(float, 10 ** torch.linspace(-6, 5, 8, dtype=torch.float64))) == pytest.approx(
        list(PUBLISHED_C)
    )
    keys = list(PatchLogreg().points)
    assert keys[0] == "C=1e-06_max_iter=1000_tol=1e-12_linesearch_max_iter=50_lbfgs_hessian_rank=5"


def test_mistakes():
    with pytest.raises(ValueError, match="C must be finite and above 0"):
        PatchLogreg(C=[0.0])
    with pytest.raises(ValueError, match="max_iter must be a whole number from 1"):
        PatchLogreg(max_iter=0)
    with pytest.raises(ValueError, match="dtype must be one of float64, float32"):
        PatchLogreg(dtype="bf16")
