"""The linear probe of DINOv2 on ImageNet: a grid of linear classifiers on frozen features.

Letters: H heads, C classes, N images.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.features.cache import net_fingerprint
from evaluation.features.dataset import evaluating, full_float32_products
from evaluation.probes.class_metrics import METRICS, check_metric
from evaluation.probes.exams import (
    HELD_OUT,
    Exam,
    TestSet,
    count_classes,
    name_tests,
    prepare_exam,
    split_tenth,
)
from evaluation.probes.files import ProbeFiles
from evaluation.probes.head_results import by_head, print_heads
from evaluation.probes.linear_heads import LinearHeads, make_grid
from evaluation.probes.run import HeadRun
from evaluation.probes.training import HeadTraining, best_head
from evaluation.progress import say
from utils import distributed
from utils.data.images import ImageDataset
from utils.ranges import check_count, check_distinct, check_list, check_word
from utils.results_file import write_results
from utils.schedules import Cosine, scale_lr
from vit.backbone import Backbone

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
MOMENTUM = 0.9
RESULTS_FILE = "results_eval_linear.json"


class LinearProbe:
    """Train the grid on data.train, evaluate the best head on data.val; callable as a probe.

    A head of base rate r learns at r * global_batch_size / 256, along a cosine to 0, by SGD with
    momentum 0.9. One optimiser of rate 1 trains all heads on losses weighted by their rates, which
    is the same, as SGD without weight decay is linear in the gradient. select_on: "val" as
    published, or "train", which holds out a tenth of each class of data.train to choose the head
    on. test_datasets: further data sets (a list, or by name) to evaluate the chosen head on, each
    with its metric and mapping. A mapping is an .npy with the columns of the logits to keep.
    classifier: a file of heads to evaluate, or to start from if it is not fully trained.
    Memory: see `LinearHeads`.
    Departs from DINOv2: the images of a step are the same on any number of processes, all heads
    have distinct names, so none is lost, top-5 also exists for fewer than five classes, and every
    image counts once.
    """

    needs_labels = True

    def __init__(
        self,
        *,
        n_last_blocks: Sequence[int] = (1, 4),
        avgpools: Sequence[bool] = (False, True),
        learning_rates: Sequence[float] = RATES,
        epochs: int = 10,
        epoch_length: int | None = None,
        global_batch_size: int = 1024,
        eval_period: int = 1250,
        select_on: str = "val",
        val_metric_type: str = "mean_accuracy",
        val_class_mapping: str | None = None,
        real_labels: str | None = None,
        test_datasets: Sequence[Any] | Mapping[str, Any] = (),
        test_metric_types: Sequence[str] = (),
        test_class_mappings: Sequence[str | None] = (),
        classifier: str | None = None,
        sampler: str = "shuffled",
        seed: int = 0,
        resize_size: int | None = None,
        crop_size: int | None = None,
        transform: Callable | None = None,
        train_transform: Callable | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        precision: str = "fp32",
        resume: bool = True,
        on_error: str = "raise",
    ) -> None:
        self.given = HeadTraining(
            epochs=epochs,
            epoch_length=epoch_length,
            global_batch_size=global_batch_size,
            batch_size=batch_size,
            num_workers=num_workers,
            precision=precision,
            sampler=sampler,
            seed=seed,
            resize_size=resize_size,
            crop_size=crop_size,
            transform=transform,
            train_transform=train_transform,
            on_error=on_error,
        )
        self.training = self.given  # completed from the data and the net when called
        self.counts: dict[str, int] = {}  # of images, when they were judged
        check_word("select_on", select_on, ("val", "train"))
        check_count("eval_period", eval_period)
        # The head is chosen by this metric, so it must be one number, not one per class.
        check_metric(val_metric_type, [name for name in METRICS if name != "per_class_accuracy"])
        self.n_last_blocks = check_list("n_last_blocks", n_last_blocks, 1)
        self.avgpools = check_distinct("avgpools", avgpools)
        self.learning_rates = check_list("learning_rates", learning_rates, 0, ends="()")
        self.eval_period, self.select_on, self.resume = eval_period, select_on, resume
        self.val_metric_type, self.val_class_mapping = val_metric_type, val_class_mapping
        self.real_labels, self.classifier = real_labels, classifier
        self.tests = name_tests(
            test_datasets, test_metric_types, test_class_mappings, metric=val_metric_type
        )
        asked = [val_metric_type, *(test.metric for test in self.tests)]
        if "imagenet_real_accuracy" in asked and real_labels is None:
            raise ValueError("imagenet_real_accuracy needs real_labels=FILE, a real.json")

    def __call__(
        self, net: Backbone, data: Mapping[str, ImageDataset], output_dir: Path, step: int = 0
    ) -> dict[str, float]:
        """Percentages of the chosen head by flat name; every rank must call this.

        Writes `results_eval_linear.json` (DINOv2's lines, appended: of val, then of each test set),
        `results.json` with all heads, and the heads.
        """
        folder = Path(output_dir)
        self.training = self.given.on(len(data["train"])).sized(net)
        with evaluating(net) as device, full_float32_products(device):
            train_set, selection, exams = self._arrange(data)
            num_classes = count_classes(data["train"])
            widths = self.training.widths(net, data["val"], max(self.n_last_blocks))
            run = self._prepare(net, widths, num_classes, train_set, folder, step, device)
            for done in run.train(resume=self.resume, classifier=self.classifier):
                due = self.eval_period and (done + 1) % self.eval_period == 0
                if due and done + 1 < run.num_steps:
                    top1 = run.judge(selection)[1]
                    best = best_head(top1)
                    if distributed.is_main():
                        name = _published_best(run.heads.names, top1)
                        _write_best(folder, done, name, top1[best].item(), judged_on=selection.name)
            return self._report(run, selection, exams, data, folder, step)

    def rates(self) -> list[float]:
        """The learning rates of the heads: base rates scaled by the batch size."""
        batch_size = self.training.global_batch_size
        return [scale_lr(rate, "linear_wrt_256", batch_size) for rate in self.learning_rates]

    @property
    def protocol(self) -> dict[str, object]:
        """What the figures depend on."""
        return {
            "probe": "linear",
            "feature": "class tokens of the last blocks after the final norm, with the mean patch "
            "of the last",
            "vote": f"the best head on {self.select_on}"
            + (" itself" if self.select_on == "val" else " (a tenth held out)"),
            **self.training_protocol,
            "val_metric_type": self.val_metric_type,
            "val_class_mapping": self.val_class_mapping,
            "tests": {
                test.name: [repr(test.dataset), test.metric, test.mapping] for test in self.tests
            },
            "world_size": distributed.world_size(),
            **self.counts,
        }

    @property
    def training_protocol(self) -> dict[str, object]:
        """What the trained heads depend on."""
        return {
            "n_last_blocks": self.n_last_blocks,
            "avgpools": self.avgpools,
            "learning_rates": self.learning_rates,
            "optimizer": "SGD, momentum 0.9, no weight decay, cosine to 0",
            **self.training.protocol(),
            "select_on": self.select_on,
            "classifier": self.classifier,
        }

    def _arrange(self, data: Mapping[str, ImageDataset]) -> tuple[ImageDataset, Exam, list[Exam]]:
        """The training images, the exam that selects the head, and the exams: val, then tests."""
        train_set, num_classes = data["train"], count_classes(data["train"])
        val = TestSet("val", data["val"], self.val_metric_type, self.val_class_mapping)
        exams = [
            prepare_exam(
                test,
                trained_on=train_set,
                num_classes=num_classes,
                real_labels=self.real_labels,
            )
            for test in (val, *self.tests)
        ]
        if self.select_on == "val":
            return train_set, exams[0], exams
        held_out, rest = split_tenth(train_set)
        # Several right answers per image are known for val only.
        several = self.val_metric_type == "imagenet_real_accuracy"
        metric = "mean_accuracy" if several else self.val_metric_type
        return rest, Exam(HELD_OUT, held_out, metric), exams

    def _prepare(
        self,
        net: Backbone,
        widths: list[int],
        num_classes: int,
        train_set: ImageDataset,
        folder: Path,
        step: int,
        device: torch.device,
    ) -> HeadRun:
        heads = LinearHeads(
            make_grid(self.n_last_blocks, self.avgpools, self.rates()),
            embed_dim=widths,
            num_classes=num_classes,
            generator=torch.Generator().manual_seed(self.training.seed),
        ).to(device)
        optimizer = torch.optim.SGD(
            [{"params": list(heads.parameters()), "initial_lr": 1.0}], lr=1.0, momentum=MOMENTUM
        )
        settings = self.training_protocol | {"train_images": len(train_set)}
        files = ProbeFiles(
            folder,
            {"net": net_fingerprint(net), "step": step, "protocol": settings},
            running="running_checkpoint_linear_eval",
            final="model_final",
        )
        schedule = Cosine(base=1.0, final=0.0, num_steps=self.training.num_steps)
        return HeadRun(
            net, heads, optimizer, schedule, train_set, self.training, files, label="linear probe"
        )

    def _report(
        self,
        run: HeadRun,
        selection: Exam,
        exams: list[Exam],
        data: Mapping[str, ImageDataset],
        folder: Path,
        step: int,
    ) -> dict[str, float]:
        """Evaluate the trained heads, write and print the results; every rank gets the figures."""
        names, chosen_by = run.heads.names, run.judge(selection)
        best = best_head(chosen_by[1])
        val, *tests = exams
        by_k = chosen_by if val is selection else run.judge(val)
        judged = {"linear": by_k} | {exam.name: run.judge(exam) for exam in tests}
        self.counts = run.count_images(data)
        figures = {
            f"{name}_top{k}": 100 * _mean(fractions[best], exam)
            for exam, (name, result) in zip(exams, judged.items(), strict=True)
            for k, fractions in result.items()
        }
        if distributed.is_main():
            name = _published_best(names, chosen_by[1])
            for exam, result in zip(exams, judged.values(), strict=True):
                accuracy = _mean(result[1][best], exam)
                _write_best(folder, run.num_steps, name, accuracy, judged_on=exam.name)
            columns = {"val": by_k} | ({} if val is selection else {selection.name: chosen_by})
            results: dict[str, Any] = {
                **figures,
                "best_classifier": names[best],
                "heads": by_head(names, columns),
            }
            for exam, result in zip(exams, judged.values(), strict=True):
                if exam.metric == "per_class_accuracy":
                    results[f"{exam.name}_per_class"] = (100 * result[1][best]).tolist()
            protocol = self.protocol | {"step": step}
            write_results(folder, "linear", protocol=protocol, figures=results)
            print_heads(names, chosen_by, selection.name, protocol)
            accuracies = {
                f"{exam.name}_accuracy": figures[f"{key}_top1"]
                for exam, key in zip(exams, judged, strict=True)
            }
            say(f"Test Results Dict {dict(best_classifier=name, **accuracies)}")
        return figures


def _mean(fractions: Tensor, exam: Exam) -> float:
    """One head's fraction correct [], or the mean over the classes [C] that have images."""
    if exam.metric == "per_class_accuracy":
        assert exam.dataset.labels is not None
        fractions = fractions[torch.from_numpy(np.unique(exam.dataset.labels))].mean()
    return fractions.item()


def _published_best(names: Sequence[str], top1: Tensor) -> str:
    """The name of the best head; as published, none where no head gives one right answer."""
    best = best_head(top1)
    return names[best] if top1[best] > 0 else ""


def _write_best(
    folder: Path, iteration: int, name: str, accuracy: float, *, judged_on: str
) -> None:
    """Append the best head to the results file in the published format, and print it."""
    found = {"name": name, "accuracy": accuracy if name else 0}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / RESULTS_FILE).open("a") as file:
        file.write(f"iter: {iteration}\n{json.dumps({'best_classifier': found})}\n\n")
    say(f"iter: {iteration}, {judged_on}: best classifier: {found}")
