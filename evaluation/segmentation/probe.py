"""The published segmentation probes: kNN and logistic regression on frozen patch tokens.

Protocol of capi (Darcet et al. 2025), which octic-vits took over: images are squashed to one size,
hyper-parameters are chosen on a tenth of the training images, and the best point is refitted on all
of them and evaluated on the test images.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from evaluation.features.dataset import PRECISIONS, device_of
from evaluation.progress import say
from evaluation.segmentation.dumps import dump_features, gather_predictions
from evaluation.segmentation.fit_rows import FitRows
from evaluation.segmentation.iou import NUM_LABELS, Confusion, Scores
from evaluation.segmentation.patch_knn import PatchKnn
from evaluation.segmentation.patch_logreg import PatchLogreg
from evaluation.segmentation.patches import (
    extract_patches,
    resolve_precision,
    shape_of,
    split_images,
)
from evaluation.segmentation.standardize import METHODS, Standardizer, fit_standardizer
from evaluation.segmentation.store import FEATURE_DTYPES, PatchStore
from utils import distributed
from utils.data.images import ImageDataset
from utils.data.segmentation import SegmentationDataset
from utils.errors import UserError
from utils.ranges import check_counts, check_range, check_word, check_words
from utils.results_file import write_results
from vit.backbone import Backbone

MOMENT_ROWS = 16384  # float64 copies of this many rows are made
CLASSIFIERS = ("logreg", "knn")


class SegmentationProbe:
    """Evaluate a frozen net by classifying pixels from its patch tokens; callable as a probe.

    train, test: data sets with masks. Each classifier's grid point is chosen on `val`, or else on a
    tenth of train, drawn by `seed`. ignore_labels: labels whose pixels do not count, by default
    those of the training set. precision: the net's autocast (auto: bf16 on a GPU, as published,
    else fp32). Features, in `feature_dtype`, stay in memory up to `in_memory_gb` per process; more
    go to unnamed files in `scratch_dir` (default: the output folder). dump_*: write features.pth
    (standardised), preds_<classifier>.pth and classifier.pth to the output folder.
    Departs from octic-vits: all ranks work on one grid point together instead of each on its own,
    the features of a training patch exist once instead of once per rank, images are in the order of
    their names, and kNN compares in fp32.
    """

    splits = ()  # no split of the config's data: this probe has its own data sets

    def __init__(
        self,
        *,
        train: SegmentationDataset,
        test: SegmentationDataset,
        val: SegmentationDataset | None = None,
        classifiers: Sequence[str] = CLASSIFIERS,
        knn: PatchKnn | None = None,
        logreg: PatchLogreg | None = None,
        ignore_labels: Sequence[int] | None = None,
        standardization: str = "StandardScaler",
        resolution: int = 224,
        seed: int = 0,
        batch_size: int = 64,
        num_workers: int = 0,
        precision: str = "auto",
        feature_dtype: str = "fp32",
        in_memory_gb: float = 2.0,
        scratch_dir: str | None = None,
        dump_features: bool = False,
        dump_predictions: bool = False,
        dump_classifier: bool = False,
    ) -> None:
        check_words("classifiers", classifiers, CLASSIFIERS)
        check_word("standardization", standardization, METHODS)
        check_word("precision", precision, ("auto", *PRECISIONS))
        check_word("feature_dtype", feature_dtype, FEATURE_DTYPES)
        check_counts(1, resolution=resolution, batch_size=batch_size)
        check_counts(seed=seed, num_workers=num_workers)
        if in_memory_gb != math.inf:  # all of them
            check_range("in_memory_gb", in_memory_gb)
        self.train, self.val, self.test, self.seed = train, val, test, seed
        known: dict[str, PatchKnn | PatchLogreg] = {
            "knn": knn or PatchKnn(),
            "logreg": logreg or PatchLogreg(),
        }
        self.classifiers = {name: known[name] for name in classifiers}
        self.ignore_labels = list(train.ignore_labels if ignore_labels is None else ignore_labels)
        if any(not 0 <= label < NUM_LABELS for label in self.ignore_labels):
            raise ValueError(f"ignore_labels lie between 0 and 255, got {self.ignore_labels}")
        self.standardization, self.resolution = standardization, resolution
        self.batch_size, self.num_workers, self.precision = batch_size, num_workers, precision
        self.feature_dtype, self.in_memory_gb = feature_dtype, in_memory_gb
        self.scratch_dir = scratch_dir
        self.dump_features, self.dump_predictions = dump_features, dump_predictions
        self.dump_classifier = dump_classifier

    def __call__(
        self, net: Backbone, data: Mapping[str, ImageDataset], output_dir: Path, step: int = 0
    ) -> dict[str, float]:
        """Extract, choose, refit, evaluate; every rank must call this. Returns percentages by name.

        After each classifier it writes `results_eval_segmentation.json` and
        `config_eval_segmentation.yaml`, as capi does, and `results.json`.
        """
        folder, device = Path(output_dir), device_of(net)
        self.precision = resolve_precision(self.precision, net)
        published: dict[str, float] = {}
        outcomes: dict[str, dict[str, Any]] = {}
        with self._extracted(net, folder) as stores:
            standardizer = self._fit_standardizer(stores["train"], device)
            if self.dump_features:
                folder.mkdir(parents=True, exist_ok=True)
                dump_features(folder / "features.pth", stores, standardizer, chunk_size=MOMENT_ROWS)
            for name in self.classifiers:
                chosen, grid, scores = self._judge(name, stores, standardizer, folder, device)
                for key, value in grid.items():
                    published[f"hparam_fitting.{name}.mIoU_{key}"] = value.miou
                published[f"labels_{name}_mIoU"] = scores.miou
                published[f"labels_{name}_acc"] = scores.acc
                outcomes[name] = self._outcome(chosen, grid, scores)
                if distributed.is_main():
                    self._write(folder, published, outcomes, step)
        return {
            f"{name}_{figure}": outcome[figure]
            for name, outcome in outcomes.items()
            for figure in ("miou", "acc", "miou_classes")
        }

    @contextmanager
    def _extracted(self, net: Backbone, folder: Path) -> Iterator[dict[str, PatchStore]]:
        """This rank's patches of train, val and test, for a `with` block."""
        val = self.train if self.val is None else self.val
        sources = {"train": self.train, "val": val, "test": self.test}
        orders = {name: list(range(len(source))) for name, source in sources.items()}
        if self.val is None:
            orders["train"], orders["val"] = split_images(len(self.train), seed=self.seed)
        if not orders["val"] and any(len(c.points) > 1 for c in self.classifiers.values()):
            raise UserError(
                f"{self.train!r}: choosing hyper-parameters takes a tenth of the training images, "
                "so there must be 10 or more"
            )
        shapes = {
            name: shape_of(net, len(order), self.resolution) for name, order in orders.items()
        }
        dtype = FEATURE_DTYPES[self.feature_dtype]
        own_bytes = sum(
            -(-shape.num_images // distributed.world_size())
            * (shape.patches_per_image * shape.dim * dtype.itemsize)
            for shape in shapes.values()
        )
        place = None if own_bytes <= self.in_memory_gb * 1e9 else Path(self.scratch_dir or folder)
        if distributed.is_main():
            where = "memory" if place is None else f"files in {place}"
            say(f"patch features: {own_bytes / 1e9:.2f} GB per process, in {where}")
        with ExitStack() as stack:
            stores = {}
            for name, order in orders.items():
                stores[name] = PatchStore(shapes[name], dtype=dtype, folder=place)
                stack.callback(stores[name].close)
                if order:
                    extract_patches(
                        net,
                        sources[name],
                        order,
                        stores[name],
                        resolution=self.resolution,
                        batch_size=self.batch_size,
                        num_workers=self.num_workers,
                        precision=self.precision,
                        label=f"{name} patches",
                    )
            yield stores

    def _fit_standardizer(self, train: PatchStore, device: torch.device) -> Standardizer:
        def chunks() -> Iterator[Tensor]:
            return (features for features, _ in train.chunks(MOMENT_ROWS, device))

        return fit_standardizer(self.standardization, chunks, dim=train.shape.dim, device=device)

    def _judge(
        self,
        name: str,
        stores: Mapping[str, PatchStore],
        standardizer: Standardizer,
        folder: Path,
        device: torch.device,
    ) -> tuple[str, dict[str, Scores], Scores]:
        """The chosen point of one classifier, the scores of all on val, its score on test."""
        classifier, test = self.classifiers[name], stores["test"]

        def rows(*parts: str) -> FitRows:
            return FitRows(
                [stores[part] for part in parts],
                ignore_labels=self.ignore_labels,
                standardizer=standardizer,
                subsampling=classifier.subsampling,
                chunk_size=classifier.chunk_size,
            )

        grid: dict[str, Scores] = {}
        chosen = next(iter(classifier.points))
        if len(classifier.points) > 1:
            grid = classifier.score(rows("train"), stores["val"], device=device)
            chosen = max(grid, key=lambda key: grid[key].miou)  # the first one on a tie
        confusion = Confusion(device)
        kept = torch.empty(test.labels.shape if self.dump_predictions else 0, dtype=torch.uint8)
        parts = rows("train", "val")
        for share, labels in classifier.fit_and_predict(parts, test, chosen, device=device):
            confusion.add(test.labels[share], labels)
            if self.dump_predictions:
                kept[share] = labels.cpu()
        if self.dump_predictions:
            kept = gather_predictions(test, kept)
        if distributed.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            if self.dump_predictions:
                torch.save(kept, folder / f"preds_{name}.pth")
            if self.dump_classifier and isinstance(classifier, PatchLogreg):
                torch.save(classifier.fitted, folder / "classifier.pth")
        return chosen, grid, confusion.scores(self.ignore_labels)

    def _outcome(self, chosen: str, grid: Mapping[str, Scores], scores: Scores) -> dict[str, Any]:
        """The entry of one classifier in results.json, in percent."""
        names = self.test.class_names
        return {
            "miou": 100 * scores.miou,
            "acc": 100 * scores.acc,
            "miou_classes": 100 * scores.miou_classes,
            "chosen": chosen,
            "class_iou": {
                names[label] if label < len(names) else str(label): 100 * iou
                for label, iou in scores.class_iou.items()
            },
            "val_miou": {key: 100 * value.miou for key, value in grid.items()},
        }

    @property
    def protocol(self) -> dict[str, object]:
        """What the figures depend on."""
        return {
            "probe": "segmentation",
            "feature": "patch tokens of the last block after the final norm, "
            f"standardised by {self.standardization} of the training part",
            "vote": "; ".join(
                {
                    "knn": "knn: per pixel, the most frequent label of the nearest patches",
                    "logreg": "logreg: one label per patch",
                }[name]
                for name in self.classifiers
            ),
            "transform": f"squash to {self.resolution} x {self.resolution}, also for the score",
            "miou": "mean over labels of targets or predictions; miou_classes: of targets alone",
            "selection": f"first tenth of numpy's permutation, seed {self.seed}, then refit on all"
            if self.val is None
            else f"{self.val!r}, then refit on all",
            "train": repr(self.train),
            "test": repr(self.test),
            "seed": self.seed,
            "ignore_labels": self.ignore_labels,
            "class_names": list(self.test.class_names),
            "precision": self.precision,
            "feature_dtype": self.feature_dtype,
            "classifiers": {name: c.protocol for name, c in self.classifiers.items()},
            "world_size": distributed.world_size(),
        }

    def _config(self, folder: Path) -> dict[str, object]:
        """The settings under their published names, and some that these lack."""
        settings = self.protocol
        return {
            "train_dataset_name": settings["train"],
            "test_dataset_name": settings["test"],
            "val_dataset_name": None if self.val is None else repr(self.val),
            "ignore_labels": self.ignore_labels,
            "classifiers": list(self.classifiers),
            "classifiers_kwargs": settings["classifiers"],
            "standardization": self.standardization,
            "resolution": self.resolution,
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "dump_features": self.dump_features,
            "dump_predictions": self.dump_predictions,
            "dump_classifier": self.dump_classifier,
            "output_dir": str(folder),
            "seed": self.seed,
            "precision": self.precision,
            "feature_dtype": self.feature_dtype,
            "world_size": settings["world_size"],
        }

    def _write(
        self,
        folder: Path,
        published: Mapping[str, float],
        outcomes: Mapping[str, Mapping[str, Any]],
        step: int,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = self._config(folder)
        (folder / "config_eval_segmentation.yaml").write_text(
            yaml.safe_dump(config, sort_keys=False)
        )
        (folder / "results_eval_segmentation.json").write_text(
            json.dumps({"results": dict(published), "config": config}, indent=2) + "\n"
        )
        write_results(
            folder, "segmentation", protocol=self.protocol | {"step": step}, figures=outcomes
        )
