"""Top-1, top-5 and loss of a classifier by DeiT's protocol, upright and under symmetries.

Letters: B batch, C classes, N images, n images of this rank.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.features.cache import transform_in_words
from evaluation.features.dataset import PRECISIONS, evaluating, own_batches
from evaluation.features.reading import logits_in
from evaluation.image_size import image_size_of
from evaluation.probes.image_counts import count_images
from evaluation.progress import say
from evaluation.results import print_table
from utils import distributed
from utils.data.classes import class_list, class_metadata, mismatch
from utils.data.images import ImageDataset
from utils.data.loaders import ON_ERROR
from utils.data.transforms import deit_evaluation_transform
from utils.errors import UserError
from utils.ranges import check_counts, check_range, check_sizes, check_word
from utils.symmetry import SYMMETRIES, transform_image

UPRIGHT = "e"
TURNS = [name for name, (_, mirrored) in SYMMETRIES.items() if not mirrored]
TOP = 5


class Outcomes(NamedTuple):
    """A net's predictions and losses, ordered by the image's index in its data set."""

    predictions: Tensor  # [N] int64, the class with the highest score
    places: Tensor  # [N] int64: rank from 0 of the label among the five best scores, else TOP
    losses: Tensor  # [N] float32, cross entropy
    indices: Tensor  # [N] int64, ascending; without those of images that were left out


class Figures(NamedTuple):
    """Accuracies in percent, losses, and how many predictions differ from the upright images'."""

    acc1: float
    acc5: float
    loss: float  # mean over batches of the mean over images, as published
    image_loss: float  # mean over images
    changed: int

    def __str__(self) -> str:
        return f"* Acc@1 {self.acc1:.3f} Acc@5 {self.acc5:.3f} loss {self.loss:.3f}"


class AccuracyProbe:
    """Evaluate a classifier on data.val by DeiT's protocol; callable as a probe of a training run.

    input_size: None is the net's own. rot_eval turns every image at random by a multiple of 90
    degrees, flop_eval mirrors every image, as the published options; these and `symmetries` (all
    eight) add a table of the symmetries concerned. precision: autocast of the net, fp32, bf16 or
    fp16 (published). on_error="skip" leaves out images that cannot be read.
    Departs from DeiT: every image counts once for any number of processes, and the loss is the one
    of a single process; the random turn is a function of the image's index; for an input_size of 32
    or less, images of another size are resized, as they could not be batched otherwise.
    """

    splits = ("val",)

    def __init__(
        self,
        *,
        input_size: int | None = None,
        eval_crop_ratio: float = 1.0,
        rot_eval: bool = False,
        flop_eval: bool = False,
        symmetries: bool = False,
        batch_size: int = 64,
        num_workers: int = 0,
        precision: str = "fp32",
        transform: Callable | None = None,
        on_error: str = "raise",
    ) -> None:
        check_word("precision", precision, PRECISIONS)
        check_word("on_error", on_error, ON_ERROR)
        check_counts(1, batch_size=batch_size)
        check_counts(num_workers=num_workers)
        check_sizes(input_size=input_size)
        check_range("eval_crop_ratio", eval_crop_ratio, ends="(]")
        self.input_size, self.eval_crop_ratio = input_size, eval_crop_ratio
        self.rot_eval, self.flop_eval, self.symmetries = rot_eval, flop_eval, symmetries
        self.batch_size, self.num_workers = batch_size, num_workers
        self.precision, self.transform, self.on_error = precision, transform, on_error
        self.counts: dict[str, int] = {}  # of images, when they were judged

    def __call__(
        self, net: nn.Module, data: Mapping[str, ImageDataset], output_dir: Path, step: int = 0
    ) -> dict[str, float]:
        """Percentages, losses and changed predictions by name; every rank must call this.

        acc1, acc5, loss, image_loss are of upright images; the prefix `rot_`, `flop_` or
        `rot_flop_` marks the published options, the name of a symmetry images under it.
        """
        dataset = data["val"]
        check_labels(dataset)
        check_same_classes(dataset, data.get("train"))
        size = self.input_size or image_size_of(net)
        by_element = judge_images(
            net,
            dataset,
            elements=self.elements,
            transform=self.transform
            or deit_evaluation_transform(
                input_size=size, eval_crop_ratio=self.eval_crop_ratio, resize_small=True
            ),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            precision=self.precision,
            on_error=self.on_error,
        )
        upright = by_element[UPRIGHT]
        count = len(upright.indices)
        if not count:
            raise UserError(f"{dataset!r}: none of the images can be read")
        self.counts = count_images({"val": dataset}, {"val": len(dataset) - count}, "accuracy")
        figures = {
            element: figures_of(outcomes, upright, batch_size=self.batch_size)
            for element, outcomes in by_element.items()
        }
        option = "_".join(["rot"] * self.rot_eval + ["flop"] * self.flop_eval)
        main = figures[UPRIGHT]
        if option:
            drawn = self._as_published(by_element, len(dataset))
            main = figures[option] = figures_of(drawn, upright, batch_size=self.batch_size)
        results = {
            f"{'' if name == UPRIGHT else name + '_'}{key}": value
            for name, part in figures.items()
            for key, value in part._asdict().items()
            if key not in (("changed",) if name == UPRIGHT else ("image_loss",))
        }
        if distributed.is_main():
            say(str(main))
            say(f"Accuracy of the network on the {count} test images: {main.acc1:.1f}%")
            if len(figures) > 1:
                self._print(figures)
        return results

    @property
    def elements(self) -> list[str]:
        """The symmetries to run, the identity first."""
        if self.symmetries or (self.rot_eval and self.flop_eval):
            return list(SYMMETRIES)
        return [*(TURNS if self.rot_eval else [UPRIGHT]), *(["m"] if self.flop_eval else [])]

    def _as_published(self, by_element: Mapping[str, Outcomes], num_images: int) -> Outcomes:
        """The outcomes under the published options, picked at random from those per symmetry."""
        mirror = "m" if self.flop_eval else ""
        choices = [mirror + turn for turn in ("", "r", "rr", "rrr")] if self.rot_eval else [mirror]
        parts = [by_element[choice or UPRIGHT] for choice in choices]
        generator = torch.Generator().manual_seed(0)
        # Drawn for all images, so that one that is left out changes no other's.
        drawn = torch.randint(len(parts), (num_images,), generator=generator)[parts[0].indices]
        return Outcomes(
            *(
                torch.stack(columns).gather(0, drawn[None])[0]
                for columns in zip(*parts, strict=True)
            )
        )

    def _print(self, figures: Mapping[str, Figures]) -> None:
        rows = [
            (name, part.acc1, part.acc5, f"{part.loss:.4f}", part.changed)
            for name, part in figures.items()
        ]
        columns = ("images", "Acc@1", "Acc@5", "loss", "predictions changed")
        print_table(
            "under symmetries of the square (r: a quarter turn, m: then mirrored; e: upright)",
            columns,
            rows,
            protocol=f"DeiT, {self.protocol['transform']}, {self.precision}",
        )

    @property
    def protocol(self) -> dict[str, object]:
        """What the figures depend on."""
        size = self.input_size or "the net's own size"
        words = f"bicubic to {size} / {self.eval_crop_ratio}, central crop"
        if self.transform:
            words = transform_in_words(self.transform, None, None)
        return {
            "probe": "accuracy",
            "feature": "logits",
            "transform": words,
            "precision": self.precision,
            "batch_size": self.batch_size,
            "symmetries": self.elements,
            **self.counts,
        }


@torch.inference_mode()
def judge_images(
    net: nn.Module,
    dataset: ImageDataset,
    *,
    elements: Sequence[str] = (UPRIGHT,),
    transform: Callable,
    batch_size: int = 64,
    num_workers: int = 0,
    precision: str = "fp32",
    on_error: str = "raise",
) -> dict[str, Outcomes]:
    """Outcomes of all images under each symmetry, on every rank; every rank must call this.

    The images are divided among the ranks, and each is read once. With on_error="skip", those that
    cannot be read have no outcome.
    """
    rows: list[Tensor] = []  # per batch [E B 4]: index, prediction, place, loss as float64
    with evaluating(net, precision) as device:

        def views_of(images: Tensor) -> list[Any]:
            images = images.to(device, non_blocking=True)
            return [net(transform_image(images, element)) for element in elements]

        for images, labels, indices in own_batches(
            dataset,
            transform,
            batch_size,
            call=views_of,
            num_workers=num_workers,
            on_error=on_error,
            label="images",
        ):
            labels = labels.to(device)
            judged = [_judge_batch(view, labels, indices, dataset) for view in views_of(images)]
            rows.append(torch.stack(judged).cpu())
    mine = torch.cat(rows, dim=1) if rows else torch.empty(len(elements), 0, 4, dtype=torch.float64)
    gathered = distributed.all_gather_variable(mine.transpose(0, 1).contiguous())  # [N E 4]
    gathered = gathered[gathered[:, 0, 0].argsort()]
    return {
        element: Outcomes(
            predictions=gathered[:, i, 1].long(),
            places=gathered[:, i, 2].long(),
            losses=gathered[:, i, 3].float(),
            indices=gathered[:, 0, 0].long(),
        )
        for i, element in enumerate(elements)
    }


def figures_of(outcomes: Outcomes, upright: Outcomes, *, batch_size: int) -> Figures:
    """Figures of all images; the published loss averages over batches of `batch_size`, in order."""
    batches = outcomes.losses.double().split(batch_size)
    return Figures(
        acc1=100 * float((outcomes.places < 1).double().mean()),
        acc5=100 * float((outcomes.places < TOP).double().mean()),
        loss=float(torch.stack([batch.mean() for batch in batches]).mean()),
        image_loss=float(outcomes.losses.double().mean()),
        changed=int((outcomes.predictions != upright.predictions).sum()),
    )


def check_labels(dataset: ImageDataset) -> None:
    """UserError if there are no images, or images without labels."""
    if not len(dataset):
        raise UserError(f"{dataset!r} holds no image to judge on")
    if dataset.labels is None or int(dataset.labels.min()) < 0:
        raise UserError(f"{dataset!r} has images without labels: nothing to compare with")


def check_same_classes(dataset: ImageDataset, trained_on: ImageDataset | None) -> None:
    """UserError if the labels of the training set, if there is one, mean other classes."""
    if trained_on is not None and getattr(trained_on, "class_names", None):
        wrong = mismatch(class_metadata(trained_on), dataset)
        if wrong:
            raise UserError(f"data.val has other classes than data.train: {wrong}")


def _judge_batch(logits: Any, labels: Tensor, indices: Tensor, dataset: ImageDataset) -> Tensor:
    """Index, prediction, place of the label and loss of each image, float64 [B 4]."""
    logits = logits_in(logits)
    classes = len(class_list(dataset)) or logits.shape[1]
    if logits.shape[1] != classes or int(labels.max()) >= classes:
        raise UserError(
            f"the net tells {logits.shape[1]} classes apart, {dataset!r} has {classes}; the head "
            "must be of these classes"
        )
    logits = logits.float()
    best = logits.topk(min(TOP, classes), dim=1).indices
    hits = F.pad(best == labels[:, None], (0, TOP - best.shape[1]))
    # With fewer than five classes, every label is among the five best.
    place = torch.where(hits.any(1), hits.to(torch.uint8).argmax(1), TOP)
    losses = F.cross_entropy(logits, labels, reduction="none")
    columns = (indices.to(losses.device), best[:, 0], place, losses)
    return torch.stack([column.double() for column in columns], dim=1)
