"""The logistic-regression probe of DINOv2: class tokens, not normalised, and a grid of C."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evaluation.features.cache import CLASS_TOKEN, class_tokens, transform_in_words
from evaluation.features.dataset import PRECISIONS, FeatureSet, check_labelled, device_of, renumber
from evaluation.image_size import settle_sizes
from evaluation.probes.class_metrics import ClassCounts, check_metric
from evaluation.probes.image_counts import count_images, count_missing
from evaluation.probes.logistic import DTYPES, LogisticModel, fit_logistic, measure_moments
from evaluation.progress import say
from utils import distributed
from utils.data.images import ImageDataset
from utils.data.loaders import ON_ERROR
from utils.errors import UserError
from utils.ranges import check_counts, check_list, check_range, check_sizes, check_word
from utils.results_file import write_results
from vit.backbone import Backbone

SELECT_ON = ("train", "val")
METRICS = ("mean_accuracy", "mean_per_class_accuracy")  # single numbers, by which C is chosen
Fit = Callable[[float, LogisticModel | None], LogisticModel]
"""(C, starting point) -> fitted model."""
PUBLISHED_C = tuple(10 ** (-6 + 11 * step / 44) for step in range(45))


class Trial(NamedTuple):
    """One value of C in the selection."""

    C: float
    top1: float  # percent by the probe's metric, on the rows the selection is made on
    steps: int
    gradient: float


class Judged(NamedTuple):
    """What an evaluation found."""

    figures: dict[str, float]
    trials: list[Trial]  # by ascending C
    steps: int  # of the fit that was judged


class LogregProbe:
    """Evaluate a frozen net by logistic regression on its class tokens, not normalised.

    C is the inverse strength of the penalty |W|^2 / 2; the grid is fitted by ascending C, each fit
    starting from the one before. The C with the best top-1, the smallest on a tie, is chosen on a
    tenth of the training images (select_on "train"), on the validation images themselves ("val",
    which DINOv2 calls finetune-on-val), or on `finetune`, a separate data set. Unless chosen on
    val, the classifier is then refitted on training and selection images together.
    metric_type: mean over images, or mean over classes of each class's mean; C is chosen by it.
    A size of None is the net's own, without a margin around the crop.
    dtype: of the products. features_on: "cpu" keeps the rows on the host and moves them chunk by
    chunk in every pass; "device" keeps them on the net's device.
    Departs from DINOv2: L-BFGS runs over row shards of all ranks, instead of one rank per C with
    cuML, so that no rank needs all rows. The optimum is the same; a fit that stops before it, after
    max_iter steps, is told.
    """

    needs_labels = True  # a training without labels skips this probe

    def __init__(
        self,
        *,
        Cs: Sequence[float] = PUBLISHED_C,
        select_on: str = "train",
        finetune: ImageDataset | None = None,
        metric_type: str = "mean_accuracy",
        max_iter: int = 1000,
        tol: float = 1e-12,
        dtype: str = "float64",
        batch_size: int = 256,
        num_workers: int = 0,
        resize_size: int | None = None,
        crop_size: int | None = None,
        transform: Callable | None = None,
        precision: str = "fp32",
        chunk_size: int = 16384,
        features_on: str = "cpu",
        on_error: str = "raise",
        features_dir: str | None = None,
    ) -> None:
        check_list("Cs", Cs, 0, ends="()")
        for name, value, known in (
            ("select_on", select_on, SELECT_ON),
            ("dtype", dtype, tuple(DTYPES)),
            ("precision", precision, tuple(PRECISIONS)),
            ("features_on", features_on, ("cpu", "device")),
            ("on_error", on_error, ON_ERROR),
        ):
            check_word(name, value, known)
        if finetune is not None and select_on == "val":
            raise ValueError("select_on=val and finetune exclude each other: C is chosen on one")
        check_counts(1, max_iter=max_iter, chunk_size=chunk_size, batch_size=batch_size)
        check_counts(num_workers=num_workers)
        check_sizes(resize_size=resize_size, crop_size=crop_size)
        check_range("tol", tol)
        self.Cs = sorted(set(Cs))
        self.select_on, self.finetune = select_on, finetune
        self.metric_type = check_metric(metric_type, METRICS)
        self.max_iter, self.tol, self.dtype = max_iter, tol, dtype
        self.batch_size, self.num_workers = batch_size, num_workers
        self.given, self.transform = (resize_size, crop_size), transform
        self.resize_size, self.crop_size = self.given  # sizes of None are set from the net later
        self.precision, self.chunk_size, self.features_on = precision, chunk_size, features_on
        self.on_error, self.features_dir = on_error, features_dir
        self.counts: dict[str, int] = {}  # of images, when they were read

    def __call__(
        self, net: Backbone, data: Mapping[str, ImageDataset], output_dir: Path, step: int = 0
    ) -> dict[str, float]:
        """Extract, choose C, fit, evaluate; every rank must call this. Returns percentages and C.

        Writes `results_eval_logreg.txt` (DINOv2's lines, appended) and `results.json`.
        """
        sets = {split: data[split] for split in ("train", "val")}
        if self.finetune is not None:
            sets["finetune"] = self.finetune
        parts = {split: self.extract(net, images, split) for split, images in sets.items()}
        left_out = {split: count_missing(sets[split], part) for split, part in parts.items()}
        self.counts = count_images(sets, left_out, "logreg")
        device = device_of(net)
        judged = self.evaluate(parts, device=device)
        if distributed.is_main():
            self._write(judged, Path(output_dir), step)
        return judged.figures

    def extract(self, net: Backbone, dataset: ImageDataset, split: str) -> FeatureSet:
        """This rank's rows of one split, renumbered without gaps; every rank must call this."""
        resize_size, crop_size = settle_sizes(net, *self.given, margin=False)
        self.resize_size, self.crop_size = resize_size, crop_size
        part = class_tokens(
            net,
            dataset,
            split,
            features_dir=self.features_dir,
            transform=self.transform,
            resize_size=resize_size,
            crop_size=crop_size,
            normalized=False,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            precision=self.precision,
            on_error=self.on_error,
        )
        check_labelled(part, split, "logistic regression")
        return renumber(part) if self.on_error == "skip" else part

    def evaluate(
        self, parts: Mapping[str, FeatureSet], *, device: torch.device | str = "cpu"
    ) -> Judged:
        """Figures and fits, given this rank's rows of train, val and perhaps finetune.

        Every rank must call this.
        """
        if self.features_on == "device":
            parts = {
                split: FeatureSet(*(piece.to(device) for piece in part))
                for split, part in parts.items()
            }
        rows = {split: _Rows(part, chunk_size=self.chunk_size) for split, part in parts.items()}
        everything = [rows["train"]]
        if "finetune" in rows:
            fitted, held_out = rows["train"], rows["finetune"]
            everything.append(held_out)
        elif self.select_on == "val":
            fitted, held_out = rows["train"], rows["val"]
        else:
            mask = draw_tenth(parts["train"])
            fitted, held_out = rows["train"].only(~mask), rows["train"].only(mask)
        labels = [int(part.labels.max()) for part in parts.values() if len(part.labels)]
        shape: dict[str, Any] = {
            "num_classes": 1 + max(distributed.gather_objects(max(labels, default=0))),
            "dim": parts["train"].features.shape[1],
            "device": torch.device(device),
            "dtype": DTYPES[self.dtype],
        }
        model, trials = self._choose(self._fits([fitted], shape), held_out)
        C = _best(trials).C
        if self.select_on != "val":
            start = time.monotonic()
            model = self._fits(everything, shape)(C, model)
            if distributed.is_main():
                seconds = time.monotonic() - start
                say(f"logreg: fitted on all training images, {model.steps} steps, {seconds:.1f} s")
        tops = judge(model, rows["val"], self.metric_type)
        figures = {"logreg_top1": tops[1], "logreg_top5": tops[5], "logreg_C": C}
        return Judged(figures, trials, model.steps)

    def _stops(self, judged: Judged) -> dict[str, int | bool]:
        """How many fits of the selection ended at max_iter, and whether the judged one did."""
        selection = sum(trial.steps >= self.max_iter for trial in judged.trials)
        return {"selection": selection, "judged": judged.steps >= self.max_iter}

    def _fits(self, rows: Sequence["_Rows"], shape: Mapping[str, Any]) -> Fit:
        """A function that fits these rows for a C, from a start; a collective call."""

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for part in rows:
                yield from part.chunks()

        moments = measure_moments(batches, **shape)
        options: dict[str, Any] = {"max_iter": self.max_iter, "tol": self.tol, "moments": moments}
        return lambda C, start: fit_logistic(batches, C=C, start=start, **options, **shape)

    def _choose(self, fit: Fit, held_out: "_Rows") -> tuple[LogisticModel, list[Trial]]:
        """The model of the best C, and the trials of all C."""
        trials: list[Trial] = []
        model: LogisticModel | None = None
        best: LogisticModel | None = None
        for C in self.Cs:
            start = time.monotonic()
            model = fit(C, model)
            top1 = judge(model, held_out, self.metric_type)[1]
            trials.append(Trial(C, top1, model.steps, model.gradient))
            if _best(trials) is trials[-1]:
                best = model
            if distributed.is_main():
                # No time left: a larger C takes longer, by how much is not known before.
                say(
                    f"logreg: {len(trials)}/{len(self.Cs)}, C = {C:.3g}: top-1 {top1:.2f} %, "
                    f"{model.steps} steps, {time.monotonic() - start:.1f} s"
                )
        assert best is not None
        return best, trials

    @property
    def protocol(self) -> dict[str, object]:
        """What the figures depend on."""
        chosen = {
            "train": "a tenth of the training images, the classifier then fitted on all",
            "val": "the images judged",
        }
        words = "a data set of its own, the classifier then fitted on train and it"
        return {
            "probe": "logreg",
            "feature": f"{CLASS_TOKEN}, not normalised",
            "transform": transform_in_words(self.transform, self.resize_size, self.crop_size),
            "classifier": "multinomial logistic regression, sum of CE + |W|^2 / 2C, intercept free",
            "C chosen on": chosen[self.select_on] if self.finetune is None else words,
            "finetune": None if self.finetune is None else repr(self.finetune),
            "metric_type": self.metric_type,
            "Cs": self.Cs,
            "max_iter": self.max_iter,
            "tol": self.tol,
            "dtype": self.dtype,
            "precision": self.precision,
            "world_size": distributed.world_size(),
            **self.counts,
        }

    def _write(self, judged: Judged, output_dir: Path, step: int) -> None:
        figures, stops = judged.figures, self._stops(judged)
        lines = (
            f"Top-1 test accuracy: {figures['logreg_top1']:.1f}",
            f"Top-5 test accuracy: {figures['logreg_top5']:.1f}",
            f"obtained for C = {figures['logreg_C']:.6g}",
        )
        output_dir.mkdir(parents=True, exist_ok=True)
        with (output_dir / "results_eval_logreg.txt").open("a") as file:
            for line in lines:
                say(line)
                file.write(f"{line}\n")
        say(
            f"logreg: {stops['selection']} of {len(judged.trials)} C stopped at max_iter = "
            f"{self.max_iter}, short of the optimum; the fit that is judged "
            f"{'did too' if stops['judged'] else 'did not'}"
        )
        trials = [trial._asdict() for trial in judged.trials]
        write_results(
            output_dir,
            "logreg",
            protocol=self.protocol | {"step": step},
            figures={**figures, "selection": trials, "stopped_at_max_iter": stops},
        )


class _Rows:
    """This rank's rows of one set, chunk by chunk; with `mask` only its rows, without a copy."""

    def __init__(self, part: FeatureSet, *, chunk_size: int, mask: Tensor | None = None) -> None:
        self.part, self.chunk_size, self.mask = part, chunk_size, mask

    def only(self, mask: Tensor) -> "_Rows":
        """The rows where `mask` is True."""
        return _Rows(self.part, chunk_size=self.chunk_size, mask=mask)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features [n, D] and labels [n]."""
        for start in range(0, len(self.part.labels), self.chunk_size):
            chunk = slice(start, start + self.chunk_size)
            features, labels = self.part.features[chunk], self.part.labels[chunk]
            if self.mask is None:
                yield features, labels
            else:
                mask = self.mask[chunk]
                yield features[mask.to(features.device)], labels[mask.to(labels.device)]


def judge(model: LogisticModel, rows: _Rows, metric: str) -> dict[int, float]:
    """Percent correct by k = 1 and 5, over the rows of all ranks; a collective call."""
    counts = ClassCounts(1, len(model.bias), device=model.bias.device)
    for features, labels in rows.chunks():
        scores = model.scores(features.to(model.bias.device))
        counts.add(scores[None], labels.to(scores.device))
    counts.reduce()
    return {k: float(share) * 100 for k, share in counts.fractions(metric).items()}


def draw_tenth(train: FeatureSet) -> Tensor:
    """Mask [n] of this rank's rows that are in the tenth of all rows on which C is chosen.

    As in DINOv2 the tenth is the first count // 10 of a permutation from a generator with seed 0.
    Every rank must call this. UserError for fewer than 10 images.
    """
    count = sum(distributed.gather_objects(len(train.labels)))
    if count < 10:
        raise UserError(
            f"a tenth of {count} training images is none to choose C on; use select_on=val"
        )
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: count // 10]
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[drawn] = True
    return chosen[train.indices.cpu()]


def _best(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest top-1, the first one on a tie."""
    return max(trials, key=lambda trial: trial.top1)
