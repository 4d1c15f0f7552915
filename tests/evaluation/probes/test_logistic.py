"""The solver finds scikit-learn's optimum for every C, in any number of processes and chunks."""

import functools
import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from evaluation.probes.logistic import LogisticModel, fit_logistic, measure_moments
from tests.evaluation.toys import in_processes
from utils import distributed

ROWS, DIM, CLASSES = 300, 12, 4


def samples(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes in correlated features that are far from centred."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    spread = torch.logspace(0, -1.5, DIM, dtype=torch.float64)
    rows = (0.7 * draw(CLASSES, DIM)[labels] + draw(ROWS, DIM)) @ (draw(DIM, DIM) * spread) + 3
    return rows, labels


def fit(rows, labels, *, chunk_size: int = 77, share: slice = slice(None), **options):
    rows, labels = rows[share], labels[share]
    options = {"num_classes": CLASSES, "dim": DIM, "dtype": torch.float64} | options
    return fit_logistic(
        lambda: zip(rows.split(chunk_size), labels.split(chunk_size), strict=True), **options
    )


def centred(weight: torch.Tensor) -> torch.Tensor:
    """Without the mean over classes, which the predictions do not depend on."""
    return (weight - weight.mean(0)).double()


def test_optimum_is_scikit_learns_along_the_grid():
    """Warm start along C from 1e-6 to 1e5, each held against Newton's method."""
    rows, labels = samples()
    model = None
    for C in 10 ** np.linspace(-6, 5, 12):
        model = fit(rows, labels, C=C, start=model)
        solver = LogisticRegression(C=C, solver="newton-cg", tol=1e-10, max_iter=2000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = solver.fit(rows.numpy(), labels.numpy())
        coefficients = centred(torch.from_numpy(expected.coef_))
        assert (centred(model.weight) - coefficients).abs().max() < 2e-3, f"{C=}"
        predictions = model.scores(rows).argmax(dim=1).numpy()
        assert np.array_equal(predictions, expected.predict(rows.numpy())), f"{C=}"
        assert model.gradient < 1e-5


@pytest.mark.parametrize("C", [1e-3, 0.1, 10.0])
def test_two_classes_share_one_row_of_weights(C):
    """scikit-learn penalises the difference of the two; also where a third class has no rows."""
    rows, labels = samples()
    labels = labels % 2
    expected = LogisticRegression(C=C, solver="newton-cg", tol=1e-10, max_iter=2000)
    expected.fit(rows.numpy(), labels.numpy())
    for num_classes in (2, 3):
        model = fit(rows, labels, C=C, num_classes=num_classes)
        difference = (model.weight[1] - model.weight[0]).numpy()
        np.testing.assert_allclose(difference, expected.coef_[0], atol=1e-3, rtol=1e-3)
        assert float(model.bias[1] - model.bias[0]) == pytest.approx(
            expected.intercept_[0], abs=0.01
        )


def test_float32_gives_the_same_predictions():
    rows, labels = samples()
    for C in (1e-4, 1.0, 100.0):
        exact, quick = (fit(rows, labels, C=C, dtype=d) for d in (torch.float64, torch.float32))
        assert quick.weight.dtype == torch.float32
        assert (centred(quick.weight) - centred(exact.weight)).abs().max() < 0.02
        same = exact.scores(rows).argmax(1) == quick.scores(rows).argmax(1)
        assert same.double().mean() > 0.99


def fit_share(C: float) -> list:
    """What each of the processes runs: the second of two has a sixth of the rows."""
    rows, labels = samples()
    alone = distributed.world_size() == 1
    share = slice(None) if alone else (slice(50, None), slice(50))[distributed.rank()]
    model = fit(rows, labels, C=C, share=share)
    return [model.weight.tolist(), model.bias.tolist()]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    alone, both = fit_share(0.1), in_processes(functools.partial(fit_share, 0.1), 2, tmp_path)
    assert both[0] == both[1]
    for ours, theirs in zip(alone, both[0], strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=2e-6, rtol=0)


def test_chunks_do_not_matter_and_a_rank_may_have_none():
    rows, labels = samples()
    whole, pieces = (fit(rows, labels, C=0.1, chunk_size=size) for size in (ROWS, 13))
    torch.testing.assert_close(whole.weight, pieces.weight, atol=1e-6, rtol=0)
    empty = measure_moments(
        lambda: [(rows, labels), (rows[:0], labels[:0])], num_classes=CLASSES, dim=DIM
    )
    assert int(empty.counts.sum()) == ROWS


def test_warm_start_takes_fewer_steps():
    rows, labels = samples()
    before = fit(rows, labels, C=1.0)
    again = fit(rows, labels, C=1.0, start=before)
    assert again.steps < before.steps / 4


def test_a_class_without_rows_never_wins():
    """And leaves the others as they are without it; a start that lacks a class serves too."""
    rows, labels = samples()
    few = fit(rows, labels, C=1.0, num_classes=CLASSES + 2)
    torch.testing.assert_close(few.weight[:CLASSES], fit(rows, labels, C=1.0).weight)
    assert few.bias[CLASSES:].tolist() == [-torch.inf] * 2
    assert few.scores(rows).argmax(1).max() < CLASSES
    seen = labels < CLASSES - 1
    start = fit(rows[seen], labels[seen], C=1.0)
    from_start = fit(rows, labels, C=1.0, start=start)
    torch.testing.assert_close(
        from_start.weight, fit(rows, labels, C=1.0).weight, atol=1e-5, rtol=0
    )


def test_one_class_and_one_row():
    model = fit(*(part[:1] for part in samples()), C=1.0)
    assert isinstance(model, LogisticModel)
    assert model.weight.abs().max() < 1e-9


def test_constant_and_repeated_features_do_no_harm():
    rows, labels = samples()
    rows = torch.cat([rows, rows[:, :2], torch.ones(ROWS, 1)], dim=1)
    model = fit(rows, labels, C=1.0, dim=DIM + 3)
    assert model.weight[:, -1].abs().max() < 1e-5
    torch.testing.assert_close(model.weight[:, :2], model.weight[:, DIM:-1], atol=1e-5, rtol=0)


def test_bad_rows_are_named():
    rows, labels = samples()
    with pytest.raises(ValueError, match="300 labels lie outside 0..3"):
        fit(rows, labels + 9, C=1.0)
    with pytest.raises(ValueError, match="some are inf or nan"):
        fit(rows.log(), labels, C=1.0)
    with pytest.raises(ValueError, match="at least one row"):
        fit(rows[:0], labels[:0], C=1.0)
    with pytest.raises(ValueError, match="C is 0"):
        fit(rows, labels, C=0)
