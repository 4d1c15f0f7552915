"""Multinomial logistic regression with an L2 penalty, by L-BFGS over rows read in chunks.

Minimises sum_i CE(W x_i + b, y_i) + |W|^2 / (2C) with a free intercept b, divided by the number of
rows: the objective of scikit-learn and cuML. For two classes these have one row of weights,
w = W1 - W0, and penalise |w|^2, which is twice |W|^2. Each rank reads only its own rows; losses and
gradients are summed over the ranks.
Letters: n rows of a chunk, N rows of all ranks, D width, K classes.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation.features.dataset import full_float32_products
from utils import distributed

DTYPES = {"float64": torch.float64, "float32": torch.float32}  # of the products
Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""A call begins one pass over this rank's rows [n, D] and class indices [n], chunk by chunk."""


class LogisticModel(NamedTuple):
    """A fitted classifier; a class without training rows has the intercept -inf and never wins."""

    weight: Tensor  # [K, D]
    bias: Tensor  # [K]
    steps: int  # of L-BFGS
    gradient: float  # largest entry of the gradient of objective / N by weights and intercepts

    def scores(self, rows: Tensor) -> Tensor:
        """Logits [n, K] of rows [n, D], on the device and in the dtype of the weights."""
        with full_float32_products(self.weight.device):
            return torch.addmm(self.bias, rows.to(self.weight), self.weight.T)


class Moments(NamedTuple):
    """Statistics of the rows that a fit needs before its first step; the same for every C."""

    counts: Tensor  # [K] int64, rows of each class
    mean: Tensor  # [D] float64
    variances: Tensor  # [D] float64: eigenvalues of the covariance, ascending, rounding removed
    directions: Tensor  # [D, D] float64: its eigenvectors, as columns


@torch.no_grad()
def fit_logistic(
    batches: Batches,
    *,
    num_classes: int,
    dim: int,
    C: float,
    max_iter: int = 1000,
    tol: float = 1e-12,
    history: int = 5,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    start: LogisticModel | None = None,
    moments: Moments | None = None,
) -> LogisticModel:
    """The minimiser for one C; every rank must call this, with the same arguments but `batches`.

    `dtype` is that of the products; sums and the state of L-BFGS are float64. It stops after
    `max_iter` steps, when no entry of the gradient exceeds `tol`, or when a step changes the loss
    by less than a hundredth of `tol` (cuML's rule) or by no more than rounding. `start`: another
    fit to start from, such as that of the next smaller C. `moments`, if given, save two passes, for
    a grid of C over the same rows.
    ValueError for a C that is not positive and for rows that cannot be fitted.
    Departs from cuML: steps are taken along the covariance's principal axes, each scaled by its
    curvature. The optimum is the same; for correlated features it takes far fewer passes.
    """
    if not C > 0:
        raise ValueError(f"C is {C}; the inverse strength of the penalty must be positive")
    device = torch.device(device)
    if moments is None:
        moments = measure_moments(
            batches, num_classes=num_classes, dim=dim, device=device, dtype=dtype
        )
    problem = _Problem(batches, moments, C=C, dtype=dtype)
    parameters = problem.parameters_of(start)
    with full_float32_products(device):
        steps = _minimize(
            problem, parameters, max_iter=max_iter, tol=tol, history=history, dtype=dtype
        )
        return problem.model_at(parameters, steps)


@torch.no_grad()
def measure_moments(
    batches: Batches,
    *,
    num_classes: int,
    dim: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Moments:
    """Class counts, mean and principal axes of the rows of all ranks, in two passes.

    A collective call. ValueError, on every rank, if there are no rows, if a label is no class
    index, or if rows are not finite.
    """
    device = torch.device(device)
    counts = torch.zeros(num_classes + 1, dtype=torch.float64, device=device)
    total = torch.zeros(dim, dtype=torch.float64, device=device)
    for rows, labels in batches():
        labels = labels.to(device)
        labels = labels.where((labels >= 0) & (labels < num_classes), num_classes)
        counts += labels.bincount(minlength=num_classes + 1)
        total += rows.to(device).sum(0, dtype=torch.float64)
    reduced = distributed.all_reduce_sum(torch.cat([counts, total]))
    counts, total = reduced[: num_classes + 1], reduced[num_classes + 1 :]
    count = int(counts.sum())
    if not count:
        raise ValueError("logistic regression needs at least one row to fit")
    if counts[-1] > 0:
        raise ValueError(f"{int(counts[-1])} labels lie outside 0..{num_classes - 1}")
    if not total.isfinite().all():
        raise ValueError("logistic regression needs finite features; some are inf or nan")
    mean = total / count
    scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    with full_float32_products(device):
        for rows, _ in batches():
            centred = rows.to(device, dtype) - mean.to(dtype)
            scatter += centred.T @ centred
    covariance = distributed.all_reduce_sum(scatter) / count
    variances, directions = torch.linalg.eigh(covariance)
    # Smaller eigenvalues are rounding errors; steps scaled by them would follow noise.
    floor = variances[-1].clamp_min(0) * dim * torch.finfo(dtype).eps
    return Moments(counts[:-1].long(), mean, variances.clamp_min(floor), directions)


class _Problem:
    """The objective in coordinates in which its curvature at uniform predictions is about one.

    W = V diag(1 / scale) Q^T with Q the principal axes, b + W mean = u / bias_scale; the parameters
    are (V, u), flat, for the classes that have rows.
    """

    def __init__(self, batches: Batches, moments: Moments, *, C: float, dtype: torch.dtype) -> None:
        self.batches, self.moments, self.dtype = batches, moments, dtype
        self.classes = moments.counts.nonzero().flatten()
        self.places = torch.full_like(moments.counts, -1)
        self.places[self.classes] = torch.arange(len(self.classes), device=self.places.device)
        self.count = int(moments.counts.sum())
        self.penalty = (2 if len(self.classes) == 2 else 1) / (C * self.count)
        # p (1 - p) of a softmax over K equally likely classes.
        curvature = max(len(self.classes) - 1, 1) / len(self.classes) ** 2
        self.scale = (curvature * moments.variances + self.penalty).sqrt()
        self.bias_scale = curvature**0.5

    def parameters_of(self, start: LogisticModel | None) -> Tensor:
        """The parameters of a fitted model, or zeros."""
        width = len(self.moments.mean)
        if start is None:
            return self.scale.new_zeros(len(self.classes) * (width + 1))
        weight = start.weight.to(self.scale)[self.classes]
        bias = start.bias.to(self.scale)[self.classes]
        bias = bias.where(bias.isfinite(), bias[bias.isfinite()].mean().nan_to_num(0))
        bias = bias + weight @ self.moments.mean
        coordinates = (weight @ self.moments.directions) * self.scale
        return torch.cat([coordinates.flatten(), bias * self.bias_scale])

    def value_and_gradient(self, parameters: Tensor) -> tuple[float, Tensor]:
        """Objective / N and its gradient by the parameters; a collective call."""
        loss, residual_rows, residuals, rotated = self._derivatives(parameters)
        value = loss / self.count + self.penalty * float(rotated.square().sum()) / 2
        by_rotated = residual_rows @ self.moments.directions / self.count + self.penalty * rotated
        by_bias = residuals / self.count / self.bias_scale
        return value, torch.cat([(by_rotated / self.scale).flatten(), by_bias])

    def model_at(self, parameters: Tensor, steps: int) -> LogisticModel:
        """The classifier of the parameters, in `dtype`, and its gradient; a collective call."""
        weight, shifted_bias, rotated = self._weights(parameters)
        _, residual_rows, residuals, _ = self._derivatives(parameters)
        # The gradient by W at fixed b: this undoes the centring of the rows.
        by_weight = residual_rows + residuals[:, None] * self.moments.mean
        by_weight = by_weight / self.count + self.penalty * weight
        gradient = max(float(by_weight.abs().max()), float(residuals.abs().max()) / self.count)
        num_classes, width = len(self.places), len(self.moments.mean)
        full_weight = weight.new_zeros(num_classes, width, dtype=self.dtype)
        full_bias = weight.new_full((num_classes,), -torch.inf, dtype=self.dtype)
        full_weight[self.classes] = weight.to(self.dtype)
        full_bias[self.classes] = (shifted_bias - weight @ self.moments.mean).to(self.dtype)
        return LogisticModel(full_weight, full_bias, steps, gradient)

    def _weights(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W, b + W mean, and W along the principal axes."""
        classes = len(self.classes)
        coordinates, bias = parameters[:-classes].view(classes, -1), parameters[-classes:]
        rotated = coordinates / self.scale
        return rotated @ self.moments.directions.T, bias / self.bias_scale, rotated

    def _derivatives(self, parameters: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
        """Summed cross entropy, residuals^T rows [K, D], residuals [K], W along the axes.

        A residual is the predicted probability, minus 1 for the right class; rows are centred.
        """
        weight, bias, rotated = self._weights(parameters)
        classes, width = weight.shape
        sums = weight.new_zeros(1 + classes * (width + 1))
        residual_rows = sums[1 : 1 + classes * width].view(classes, width)
        low_weight, low_bias = weight.to(self.dtype), bias.to(self.dtype)
        for rows, labels in self._chunks():
            logits = torch.addmm(low_bias, rows, low_weight.T)
            logits -= logits.logsumexp(dim=1, keepdim=True)
            right = labels[:, None]
            sums[0] -= logits.gather(1, right).sum(dtype=torch.float64)
            residuals = logits.exp_()
            residuals.scatter_add_(1, right, residuals.new_full((1, 1), -1).expand(right.shape))
            residual_rows += residuals.T @ rows
            sums[-classes:] += residuals.sum(0, dtype=torch.float64)
        sums = distributed.all_reduce_sum(sums)
        return float(sums[0]), sums[1:-classes].view(classes, width), sums[-classes:], rotated

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over this rank's rows, centred, with labels as indices into `classes`."""
        mean = self.moments.mean.to(self.dtype)
        for rows, labels in self.batches():
            yield rows.to(mean) - mean, self.places[labels.to(mean.device)]


def _minimize(
    problem: _Problem,
    parameters: Tensor,
    *,
    max_iter: int,
    tol: float,
    history: int,
    dtype: torch.dtype,
) -> int:
    """Move `parameters` to the minimum, in place; returns the number of steps."""
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=max_iter,
        max_eval=25 * max_iter,
        tolerance_grad=tol,
        # Smaller changes of a loss summed from products in `dtype` are rounding.
        tolerance_change=max(tol / 100, torch.finfo(dtype).eps / 64),
        history_size=history,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        value, parameters.grad = problem.value_and_gradient(parameters)
        return value

    with torch.no_grad():
        optimizer.step(closure)
    return int(optimizer.state[parameters]["n_iter"])
