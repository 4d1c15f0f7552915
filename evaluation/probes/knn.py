"""The kNN probe of DINO and DINOv2: normalised class tokens, weighted vote of the nearest k."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from evaluation.features.cache import class_tokens, transform_in_words
from evaluation.features.dataset import (
    PRECISIONS,
    FeatureSet,
    check_labelled,
    device_of,
    gather_features,
    gather_labels,
    renumber,
)
from evaluation.image_size import settle_sizes
from evaluation.probes.image_counts import count_images, count_missing
from evaluation.probes.neighbours import (
    SEARCH_DTYPES,
    choose_rows,
    classify,
    find_neighbours,
    gather_neighbours,
)
from evaluation.progress import say
from evaluation.results import append_lines
from utils import distributed
from utils.data.images import ImageDataset
from utils.data.loaders import ON_ERROR
from utils.ranges import check_counts, check_range, check_sizes, check_word
from utils.results_file import write_results
from vit.backbone import Backbone

Figures = dict[tuple[str, int], dict[int, float]]
"""(group, k) -> {1: percent top-1, 5: percent top-5}; a group is "full" or "n per class"."""


class KnnProbe:
    """Evaluate a frozen net with a kNN classifier; callable as a probe of a training run.

    A size of None is the net's own (`evaluation.image_size`). `precision` is the net's autocast
    (fp32, bf16, fp16), `search_precision` that of the similarities; `transform` replaces resizing,
    cropping and ImageNet's normalisation. `features_dir`: folder where class tokens are stored and
    from which they are reused.
    Departs from DINOv2: the search is in fp32 by default, because fp16 has only about 1024 distinct
    similarities, which gives ties at the k-th neighbour; images count once on any number of ranks.
    """

    needs_labels = True  # a training without labels skips this probe

    def __init__(
        self,
        *,
        ks: Sequence[int] = (10, 20, 100, 200),
        temperature: float = 0.07,
        n_per_class_list: Sequence[int] = (-1,),
        num_tries: int = 1,
        batch_size: int = 256,
        num_workers: int = 0,
        resize_size: int | None = None,
        crop_size: int | None = None,
        transform: Callable | None = None,
        precision: str = "fp32",
        search_precision: str = "fp32",
        chunk_size: int = 65536,
        on_error: str = "raise",
        features_dir: str | None = None,
    ) -> None:
        if not ks or min(ks) < 1:
            raise ValueError(f"kNN needs values of k of at least 1, got {list(ks)}")
        check_range("temperature", temperature, ends="(]")
        check_counts(1, num_tries=num_tries, batch_size=batch_size, chunk_size=chunk_size)
        check_counts(num_workers=num_workers)
        check_sizes(resize_size=resize_size, crop_size=crop_size)
        check_word("on_error", on_error, ON_ERROR)
        check_word("search_precision", search_precision, SEARCH_DTYPES)
        check_word("precision", precision, PRECISIONS)
        if any(n == 0 for n in n_per_class_list):
            raise ValueError("n_per_class_list: 0 per class leave no neighbour; -1 means all")
        self.ks = list(dict.fromkeys(ks))  # in the order given, which is that of the results
        self.temperature = temperature
        self.n_per_class_list = list(n_per_class_list)
        self.num_tries = num_tries
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.given = resize_size, crop_size
        self.resize_size, self.crop_size = self.given  # sizes of None are set from the net later
        self.transform = transform
        self.precision = precision
        self.search_precision = search_precision
        self.chunk_size = chunk_size
        self.on_error = on_error
        self.features_dir = features_dir
        self.counts: dict[str, int] = {}  # of images, when they were read

    def __call__(
        self, net: Backbone, data: Mapping[str, ImageDataset], output_dir: Path, step: int = 0
    ) -> dict[str, float]:
        """Extract, search and write; every rank must call this. Returns percentages by flat name.

        Writes `results_eval_knn.json` (DINOv2's lines, appended) and `results.json`.
        """
        parts = {split: self.extract(net, data[split], split) for split in ("train", "val")}
        left_out = {split: count_missing(data[split], part) for split, part in parts.items()}
        self.counts = count_images({split: data[split] for split in parts}, left_out, "knn")
        train, val = parts["train"], parts["val"]
        figures = self.evaluate(train, val, device=device_of(net))
        if distributed.is_main():
            self._write(figures, Path(output_dir), step)
        return {
            f"knn{k}{'' if group == 'full' else '_' + group.replace(' ', '_')}_top{top}": percent
            for (group, k), tops in figures.items()
            for top, percent in tops.items()
        }

    def extract(self, net: Backbone, dataset: ImageDataset, split: str) -> FeatureSet:
        """This rank's rows of one split, on the host; every rank must call this."""
        resize_size, crop_size = settle_sizes(net, *self.given)
        self.resize_size, self.crop_size = resize_size, crop_size
        part = class_tokens(
            net,
            dataset,
            split,
            features_dir=self.features_dir,
            transform=self.transform,
            resize_size=resize_size,
            crop_size=crop_size,
            normalized=True,
            dtype=SEARCH_DTYPES[self.search_precision],
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            precision=self.precision,
            on_error=self.on_error,
        )
        check_labelled(part, split, "kNN")
        # The search numbers rows, which differ from image numbers if images were left out.
        return renumber(part) if self.on_error == "skip" else part

    def evaluate(
        self, train: FeatureSet, val: FeatureSet, *, device: torch.device | str = "cpu"
    ) -> Figures:
        """Percentages, given this rank's rows of both splits; every rank must call this."""
        train_labels, val = gather_labels(train), gather_features(val)
        if not len(train_labels) or not len(val.labels):
            raise ValueError("kNN needs at least one training and one validation image")
        results: Figures = {}
        for n_per_class in self.n_per_class_list:
            group = "full" if n_per_class < 0 else f"{n_per_class} per class"
            tries = [
                self._evaluate_rows(rows, ks, group, train, train_labels, val, device)
                for rows, ks in choose_rows(
                    train_labels, self.ks, n_per_class=n_per_class, num_tries=self.num_tries
                )
            ]
            for k, tops in tries[0].items():
                results[group, k] = {
                    top: sum(figures[k][top] for figures in tries) / len(tries) for top in tops
                }
        return results

    def _evaluate_rows(
        self,
        rows: Tensor | None,
        ks: Sequence[int],
        group: str,
        train: FeatureSet,
        train_labels: Tensor,
        val: FeatureSet,
        device: torch.device | str,
    ) -> dict[int, dict[int, float]]:
        available = len(train_labels) if rows is None else len(rows)
        if max(ks) > available and distributed.is_main():
            asked = ", ".join(str(k) for k in ks if k > available)
            say(f"kNN ({group}): k = {asked} asked, all {available} training images vote")
        k = min(max(ks), available)
        if rows is not None:
            mine = torch.isin(train.indices, rows).nonzero().flatten()
            train = FeatureSet(*(part[mine] for part in train))
        own = find_neighbours(
            val.features.to(device),
            train.features,
            k=k,
            indices=train.indices,
            chunk_size=self.chunk_size,
            precision=self.search_precision,
        )
        return classify(
            gather_neighbours(own, k),
            train_labels,
            val.labels,
            ks=ks,
            temperature=self.temperature,
        )

    @property
    def protocol(self) -> dict[str, object]:
        """What the figures depend on."""
        return {
            "probe": "knn",
            "feature": "class token of the last block after the final norm, L2-normalised",
            "vote": f"softmax of similarity / {self.temperature}",
            "transform": transform_in_words(self.transform, self.resize_size, self.crop_size),
            "ks": self.ks,
            "n_per_class_list": self.n_per_class_list,
            "num_tries": self.num_tries,
            "precision": self.precision,
            "search_precision": self.search_precision,
            "world_size": distributed.world_size(),
            **self.counts,
        }

    def _write(self, figures: Figures, output_dir: Path, step: int) -> None:
        lines = {
            f"{key} Top {top}": percent
            for key, tops in figures.items()
            for top, percent in tops.items()
        }
        append_lines(output_dir / "results_eval_knn.json", lines)
        write_results(output_dir, "knn", protocol=self.protocol | {"step": step}, figures=lines)
