"""Logistic regression on patches: one label per patch, copied to its pixels.

Protocol of capi's segmentation probe (Darcet et al. 2025), whose tables call it linear.
Letters: m patches of a chunk, D width, K classes, p pixels a side of a patch.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from evaluation.probes.logistic import (
    DTYPES,
    LogisticModel,
    Moments,
    fit_logistic,
    measure_moments,
)
from evaluation.progress import say
from evaluation.segmentation.fit_rows import FitRows
from evaluation.segmentation.iou import NUM_LABELS, Confusion, Scores
from evaluation.segmentation.store import PatchStore
from utils import distributed
from utils.errors import UserError
from utils.ranges import check_count, check_list, check_range, check_word

# 10^linspace(-6, 5, 8), to the last digit, because they are part of the published keys.
PUBLISHED_C = (
    *(1e-06, 3.727593720314938e-05, 0.0013894954943731374, 0.05179474679231213),
    *(1.9306977288832496, 71.96856730011514, 2682.6957952797275, 100000.0),
)
Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]


class PatchLogreg:
    """The classifier and its grid of C, the inverse strength of the L2 penalty.

    The classes are the labels that are most frequent in some training patch. hold_gb: GB of
    standardised patches that each process keeps on the device during a fit; null is half of a GPU's
    free memory, 2 on the CPU. If they need more, every evaluation of the objective reads them
    again. warm_start starts the fit of each C from the one before. dtype: of the products; those of
    float32, as published, leave the weights of a large C off the optimum.
    Departs from capi and octic-vits: torch's L-BFGS instead of cuML's, with the same objective, and
    all processes fit one C together instead of one C each.
    """

    name = "logreg"

    def __init__(
        self,
        *,
        C: Sequence[float] = PUBLISHED_C,
        max_iter: int = 1000,
        tol: float = 1e-12,
        history: int = 5,
        dtype: str = "float32",
        warm_start: bool = False,
        subsampling: int = 1,
        chunk_size: int = 65536,
        hold_gb: float | None = None,
    ) -> None:
        check_list("C", C, 0, ends="()")
        check_count("max_iter", max_iter, 1)
        check_count("history", history, 1)
        check_count("subsampling", subsampling, 1)
        check_count("chunk_size", chunk_size, 1)
        check_range("tol", tol)
        check_word("dtype", dtype, DTYPES)
        check_range("hold_gb", hold_gb or 0.0)
        self.C, self.max_iter, self.tol, self.history = list(map(float, C)), max_iter, tol, history
        self.dtype, self.warm_start, self.subsampling = dtype, warm_start, subsampling
        self.chunk_size, self.hold_gb = chunk_size, hold_gb
        self.fitted: dict[str, Tensor] = {}

    @property
    def points(self) -> dict[str, float]:
        """The grid by its published keys, in order."""
        # The key includes cuML's bound on line search steps; our line search has its own.
        rest = f"linesearch_max_iter=50_lbfgs_hessian_rank={self.history}"
        return {f"C={C}_max_iter={self.max_iter}_tol={self.tol}_{rest}": C for C in self.C}

    @property
    def protocol(self) -> dict[str, object]:
        """What the figures depend on."""
        return {
            "C": self.C,
            "max_iter": self.max_iter,
            "tol": self.tol,
            "lbfgs_memory": self.history,
            "dtype": self.dtype,
            "warm_start": self.warm_start,
            "subsampling": self.subsampling,
        }

    def score(
        self, rows: FitRows, queries: PatchStore, *, device: torch.device
    ) -> dict[str, Scores]:
        """Scores of the queries at every C; every rank must call this."""
        found: dict[str, Scores] = {}
        model: LogisticModel | None = None
        batches = hold_batches(rows, device, hold_gb=self.hold_gb)
        moments = self._moments(batches, rows, device)
        for key, C in self.points.items():
            begin = time.perf_counter()
            start = model if self.warm_start else None
            model = self.fit(batches, rows, C, device=device, start=start, moments=moments)
            confusion = Confusion(device)
            for share, labels in predict(model, rows, queries, device=device):
                confusion.add(queries.labels[share], labels)
            found[key] = confusion.scores(rows.ignore_labels)
            if distributed.is_main():
                seconds = time.perf_counter() - begin
                percent = f"{100 * found[key].miou:.2f} % mIoU"
                say(f"logreg C={C:.4g}: {percent}, {model.steps} steps, {seconds:.0f} s")
        return found

    def fit_and_predict(
        self, rows: FitRows, queries: PatchStore, key: str, *, device: torch.device
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield (own places, labels [m, p^2]) of the queries at one C; every rank must exhaust it.

        The classifier is kept in `fitted`, under scikit-learn's names.
        """
        batches = hold_batches(rows, device, hold_gb=self.hold_gb)
        moments = self._moments(batches, rows, device)
        model = self.fit(batches, rows, self.points[key], device=device, moments=moments)
        self.fitted = {
            "coef_": model.weight.cpu(),
            "intercept_": model.bias.cpu(),
            "classes_": rows.classes,
        }
        yield from predict(model, rows, queries, device=device)

    def fit(
        self,
        batches: Batches,
        rows: FitRows,
        C: float,
        *,
        device: torch.device,
        start: LogisticModel | None = None,
        moments: Moments | None = None,
    ) -> LogisticModel:
        """The classifier of one C over the patches of all ranks; every rank must call this."""
        return fit_logistic(
            batches,
            num_classes=len(rows.classes),
            dim=rows.dim,
            C=C,
            max_iter=self.max_iter,
            tol=self.tol,
            history=self.history,
            device=device,
            dtype=DTYPES[self.dtype],
            start=start,
            moments=moments,
        )

    def _moments(self, batches: Batches, rows: FitRows, device: torch.device) -> Moments:
        try:
            return measure_moments(
                batches,
                num_classes=len(rows.classes),
                dim=rows.dim,
                device=device,
                dtype=DTYPES[self.dtype],
            )
        except ValueError as error:
            raise UserError(f"{error} (standardization: none lets them through)") from None


@torch.no_grad()
def predict(
    model: LogisticModel, rows: FitRows, queries: PatchStore, *, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (own places, labels [m, p^2]) of this rank's queries, in order, on `device`."""
    classes, pixels = rows.classes.to(device, torch.uint8), queries.shape.pixels_per_patch
    chunks = queries.chunks(rows.chunk_size, device, transform=rows.standardizer)
    for features, places in chunks:
        labels = classes[model.scores(features).argmax(1)]
        share = slice(int(places[0]), int(places[-1]) + 1)
        yield share, labels[:, None].expand(-1, pixels)


@torch.no_grad()
def hold_batches(rows: FitRows, device: torch.device, *, hold_gb: float | None = None) -> Batches:
    """A function whose calls pass over this rank's (features [m, D], class indices [m]).

    They are kept on the device if they fit, and else read again in each pass.
    """
    index = torch.zeros(NUM_LABELS, dtype=torch.int64)
    index[rows.classes] = torch.arange(len(rows.classes))

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        for features, labels, _ in rows.chunks(device):
            yield features, index[labels.int()].to(device)

    needed = rows.own_count * rows.dim * torch.float32.itemsize
    if needed <= _room(device, hold_gb):
        held = list(read())
        return lambda: held
    if distributed.is_main():
        say(f"logreg: {needed / 1e9:.1f} GB of patches do not fit; they are read for each pass")
    return read


def _room(device: torch.device, hold_gb: float | None) -> float:
    if hold_gb is not None:
        return hold_gb * 1e9
    return torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else 2e9
