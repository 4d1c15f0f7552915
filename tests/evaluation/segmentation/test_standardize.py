"""Chunked fits equal scikit-learn's on the whole matrix; columns without spread stay finite."""

import pytest
import torch
from sklearn import preprocessing
from sklearn.decomposition import PCA

from evaluation.segmentation import standardize
from evaluation.segmentation.standardize import METHODS, fit_standardizer
from utils.errors import UserError


def rows():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(101, 5, generator=generator) * torch.tensor([1, 10, 0.1, 3, 0.0]) + 50
    return matrix


@pytest.mark.parametrize("name", ["StandardScaler", "RobustScaler"])
def test_equals_sklearn(name):
    """Also far from zero, and where a column is constant."""
    matrix = rows()
    found = fit_standardizer(name, lambda: matrix.split(17), dim=5)(matrix)
    theirs = getattr(preprocessing, name)().fit_transform(matrix.double().numpy())
    torch.testing.assert_close(found.double(), torch.from_numpy(theirs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_chunks_do_not_matter(method):
    matrix = rows()
    before = matrix.clone()
    found = [
        fit_standardizer(method, lambda size=size: matrix.split(size), dim=5)(matrix).abs()
        for size in (101, 10)
    ]
    assert torch.equal(matrix, before)
    # Whitening blows the rounding of the constant column up.
    columns = slice(0, 4) if method == "pca_whiten" else slice(None)
    torch.testing.assert_close(found[0][:, columns], found[1][:, columns], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("whiten", [False, True])
def test_axes_point_where_sklearns_do(whiten):
    mixed = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1))).Q
    matrix = rows()[:, :4] @ mixed
    found = fit_standardizer("pca_whiten" if whiten else "pca", lambda: matrix.split(9), dim=4)
    theirs = PCA(whiten=whiten).fit_transform(matrix.double().numpy())
    torch.testing.assert_close(
        found(matrix), torch.from_numpy(theirs).float(), rtol=1e-3, atol=1e-3
    )


def test_pca_whitens():
    found = fit_standardizer("pca_whiten", lambda: rows()[:, :4].split(10), dim=4)(rows()[:, :4])
    torch.testing.assert_close(found.T.cov(), torch.eye(4), rtol=1e-3, atol=1e-3)


def test_quantiles_of_a_sample(monkeypatch):
    """Of many rows a random part decides; the quartiles stay close."""
    monkeypatch.setattr(standardize, "QUANTILE_ROWS", 2000)
    matrix = torch.randn(20000, 2, generator=torch.Generator().manual_seed(0)) * 3 + 1
    found = fit_standardizer("RobustScaler", lambda: matrix.split(999), dim=2)
    torch.testing.assert_close(found.mean, torch.ones(2), rtol=0, atol=0.3)
    torch.testing.assert_close(found.scale, torch.full((2,), 3 * 1.349), rtol=0.1, atol=0)


def test_mistakes():
    with pytest.raises(ValueError, match="standardization must be one of StandardScaler"):
        fit_standardizer("scale", lambda: [rows()], dim=5)
    with pytest.raises(UserError, match="inf or nan"):
        fit_standardizer("center", lambda: [rows() / 0], dim=5)
