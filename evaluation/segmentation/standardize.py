"""Standardise patch features: fitted over chunks, and applied to features as they are read.

Letters: m patches of a chunk, D width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluation.features.dataset import full_float32_products
from utils import distributed
from utils.errors import UserError
from utils.ranges import check_word

METHODS = ("StandardScaler", "center", "center_div", "RobustScaler", "pca", "pca_whiten", "none")
QUANTILE_ROWS = 65536

Chunks = Callable[[], Iterable[Tensor]]
"""A call begins one pass over this rank's features [m, D], float32, on the device."""


@dataclass(frozen=True)
class Standardizer:
    """x -> (x - mean) / scale, then rotated; float32 [D] or [D, D'], None skips a step."""

    mean: Tensor | None = None
    scale: Tensor | None = None
    rotation: Tensor | None = None

    def __call__(self, features: Tensor) -> Tensor:
        """Standardised features [m, D'] as a new tensor."""
        if self.mean is None:
            return features
        features = features - self.mean
        if self.scale is not None:
            features /= self.scale
        if self.rotation is not None:
            with full_float32_products(features.device):
                features = features @ self.rotation
        return features


class _Moments(NamedTuple):
    num_rows: int  # of all ranks
    mean: Tensor  # [D] float64
    variance: Tensor  # [D] float64, divided by the count
    total_variance: float  # of all entries about their one mean
    covariance: Tensor | None  # [D, D] float64, divided by the count


@torch.no_grad()
def fit_standardizer(
    method: str, chunks: Chunks, *, dim: int, device: torch.device | str = "cpu"
) -> Standardizer:
    """Fit over the rows of all ranks; every rank must call this. `method` is one of METHODS.

    They are scikit-learn's, but center_div divides the centred features by one standard deviation,
    of all entries about their common mean, plus 1e-8. Moments are sums in float64.
    """
    check_word("standardization", method, METHODS)
    if method == "none":
        return Standardizer()
    if method == "RobustScaler":
        return _robust(chunks, dim, device)
    moments = _measure(chunks, dim, device, with_covariance=method.startswith("pca"))
    mean = moments.mean.float()
    if method == "center":
        return Standardizer(mean)
    if method == "center_div":
        deviation = moments.total_variance**0.5 + 1e-8
        return Standardizer(mean, torch.full_like(mean, deviation))
    if method == "StandardScaler":
        return Standardizer(mean, _scale(moments).float())
    return Standardizer(mean, None, _rotation(moments, whiten=method == "pca_whiten").float())


def _measure(
    chunks: Chunks, dim: int, device: torch.device | str, *, with_covariance: bool
) -> _Moments:
    """Moments, summed about the mean of rank 0's first chunk to avoid cancellation."""
    pivot = torch.zeros(dim, dtype=torch.float64, device=device)
    for chunk in chunks():
        pivot = chunk.mean(0, dtype=torch.float64)
        break
    # Rank 0 has the first image, so its pivot is never the empty one.
    pivot = pivot * (1.0 if distributed.is_main() else 0.0)
    pivot = distributed.all_reduce_sum(pivot)
    sums = torch.zeros(2 * dim + 1, dtype=torch.float64, device=device)
    products = sums.new_zeros((dim, dim) if with_covariance else 0)
    for chunk in chunks():
        centred = chunk.double() - pivot
        sums[0] += len(centred)
        sums[1 : dim + 1] += centred.sum(0)
        sums[dim + 1 :] += centred.square().sum(0)
        if with_covariance:
            products += centred.T @ centred
    sums, products = distributed.all_reduce_sum(sums), distributed.all_reduce_sum(products)
    count = int(sums[0])
    if not count:
        raise UserError("standardization needs at least one patch")
    shift, squares = sums[1 : dim + 1] / count, sums[dim + 1 :] / count
    mean, variance = pivot + shift, (squares - shift.square()).clamp_min(0)
    if not mean.isfinite().all() or not variance.isfinite().all():
        raise UserError("the patch features hold inf or nan; try precision=fp32")
    total_variance = float(variance.mean() + mean.var(unbiased=False))
    covariance = products / count - shift.outer(shift) if with_covariance else None
    return _Moments(count, mean, variance, total_variance, covariance)


def _scale(moments: _Moments) -> Tensor:
    """Standard deviations; 1 where a variance is within rounding, by scikit-learn's bound."""
    eps = torch.finfo(torch.float64).eps
    bound = (
        moments.num_rows * eps * moments.variance + (moments.num_rows * moments.mean * eps).square()
    )
    return moments.variance.sqrt().where(moments.variance > bound, 1.0)


def _rotation(moments: _Moments, *, whiten: bool) -> Tensor:
    """Principal axes as columns, largest first; at most as many as rows, as scikit-learn does.

    The sign of an axis, which `eigh` leaves to the device, makes its largest entry positive, as in
    scikit-learn.
    """
    assert moments.covariance is not None
    variances, axes = torch.linalg.eigh(moments.covariance)
    kept = min(moments.num_rows, len(variances))
    variances, axes = variances.flip(0)[:kept], axes.flip(1)[:, :kept]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    if not whiten:
        return axes
    unbiased = variances * moments.num_rows / max(moments.num_rows - 1, 1)
    deviations = unbiased.clamp_min(0).sqrt()
    return axes / deviations.clamp_min(torch.finfo(torch.float64).eps)


def _robust(chunks: Chunks, dim: int, device: torch.device | str) -> Standardizer:
    """Standardise by the median and the distance of the quartiles of each column.

    Departs from scikit-learn: above 65,536 rows the quantiles are those of a random sample of about
    that size, because exact ones need all rows at once; a quartile's rank is off by some 0.2 %.
    """
    counts = torch.tensor(sum(map(len, chunks())), dtype=torch.float64, device=device)
    count = int(distributed.all_reduce_sum(counts))
    if not count:
        raise UserError("standardization needs at least one patch")
    generator = torch.Generator().manual_seed(distributed.rank())
    parts = [torch.empty(0, dim, device=device)]
    for chunk in chunks():
        if count > QUANTILE_ROWS:
            drawn = torch.rand(len(chunk), generator=generator) < QUANTILE_ROWS / count
            chunk = chunk[drawn.to(chunk.device)]
        parts.append(chunk)
    sample = distributed.all_gather_variable(torch.cat(parts)).cpu().numpy()
    low, median, high = np.percentile(sample, (25, 50, 75), axis=0, overwrite_input=True)
    quartiles = torch.from_numpy(high - low).to(device, torch.float32)
    scale = quartiles.where(quartiles >= 10 * torch.finfo(torch.float32).eps, 1.0)
    return Standardizer(torch.from_numpy(median).to(device, torch.float32), scale)
