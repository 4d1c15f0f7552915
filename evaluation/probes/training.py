"""Train and evaluate many classifiers at once on the features of a frozen net.

Every batch goes through the net once, for all heads. Letters: H heads, B batch, C classes, N
images.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from evaluation.features.cache import transform_in_words
from evaluation.features.dataset import PRECISIONS, autocast_of, device_of, own_batches
from evaluation.features.reading import features_of
from evaluation.image_size import settle_sizes
from evaluation.probes.class_metrics import make_counts
from evaluation.probes.exams import Exam
from evaluation.probes.linear_heads import head_losses
from evaluation.progress import track
from utils import distributed
from utils.data.images import ImageDataset
from utils.data.loaders import (
    ON_ERROR,
    TrainingBatches,
    evaluation_batches,
    training_batches,
)
from utils.data.samplers import SAMPLERS
from utils.data.transforms import evaluation_transform, training_transform
from utils.effective_batch import shared_batches
from utils.errors import UserError
from utils.ranges import check_count, check_counts, check_word
from utils.schedules import Schedule
from vit.backbone import Backbone, Features

LONGEST_EPOCH = 1250  # steps


class Heads(Protocol):
    """Classifiers with the same classes that read features of the same blocks."""

    names: list[str]
    num_classes: int
    layers: tuple[int, ...]  # the blocks they read
    loss_weights: Tensor  # [H], the weight of each head's loss

    def read(self, features: Sequence[Features]) -> Any:
        """The inputs of the heads, made from the features; shared inputs are made once."""
        ...

    def __call__(self, inputs: Any) -> Tensor:
        """Logits [H B C]."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters."""
        ...


@dataclass(frozen=True, kw_only=True)
class HeadTraining:
    """Settings of a training of heads: its length, images per step, and how images are read.

    An epoch has `epoch_length` steps; None is one pass over data.train, but at most the published
    1250 (which ImageNet gives at 1024 images per step). `batch_size` is the most images that a
    process sends through the net at once; by accumulation, a step of `global_batch_size` images is
    the same on any number of processes that divides it evenly.
    A size of None is the net's own (`evaluation.image_size`).
    ValueError for invalid values.
    """

    epochs: int
    epoch_length: int | None
    global_batch_size: int
    batch_size: int
    num_workers: int
    precision: str
    sampler: str
    seed: int
    resize_size: int | None
    crop_size: int | None
    transform: Callable | None
    train_transform: Callable | None
    on_error: str

    def __post_init__(self) -> None:
        counts = ("epochs", "global_batch_size", "batch_size")
        for name in (*counts, "epoch_length", "resize_size", "crop_size"):
            value = getattr(self, name)
            if value is not None or name in counts:
                check_count(name, value, 1)
        check_counts(num_workers=self.num_workers, seed=self.seed)
        for name, known in (
            ("precision", PRECISIONS),
            ("sampler", SAMPLERS),
            ("on_error", ON_ERROR),
        ):
            check_word(name, getattr(self, name), known)

    def on(self, num_images: int) -> "HeadTraining":
        """A copy with `epoch_length` set for that many training images, if it was None."""
        one_pass = max(1, round(num_images / self.global_batch_size))
        return replace(self, epoch_length=self.epoch_length or min(one_pass, LONGEST_EPOCH))

    def sized(self, net: Backbone) -> "HeadTraining":
        """A copy with image sizes that were None set to the net's own."""
        resize_size, crop_size = settle_sizes(net, self.resize_size, self.crop_size)
        return replace(self, resize_size=resize_size, crop_size=crop_size)

    @property
    def sizes(self) -> tuple[int, int]:
        """Shorter side and crop in pixels; call `sized` first."""
        assert self.resize_size is not None and self.crop_size is not None
        return self.resize_size, self.crop_size

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch; call `on` first."""
        assert self.epoch_length is not None
        return self.epoch_length

    @property
    def num_steps(self) -> int:
        """Steps of the whole training; call `on` first."""
        return self.epochs * self.steps_per_epoch

    @property
    def micro_batches(self) -> tuple[int, int]:
        """Images per micro-batch and micro-batches per step; UserError if they do not divide."""
        try:
            return shared_batches(self.global_batch_size, self.batch_size, distributed.world_size())
        except UserError as error:
            raise UserError(f"global_batch_size: {error}") from None

    def batches(self, dataset: ImageDataset, *, first_step: int) -> TrainingBatches:
        """This rank's endless training batches (images, labels), from a step on."""
        size, count = self.micro_batches
        return training_batches(
            dataset,
            self.train_transform or training_transform(crop_size=self.sizes[1]),
            _stack,
            size,
            first_step=first_step,
            seed=self.seed,
            sampler=self.sampler,
            num_workers=self.num_workers,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            on_error=self.on_error,
            micro_batches=count,
        )

    def widths(self, net: Backbone, dataset: ImageDataset, num_blocks: int) -> list[int]:
        """Channels of the class tokens of the last blocks, earliest first, found from one image."""
        images, _, _ = next(
            evaluation_batches(dataset, self.evaluation_transform(), 1, on_error=self.on_error)
        )
        frozen = FrozenFeatures(net, range(-num_blocks, 0), self.precision)
        return [features.cls.shape[-1] for features in frozen(images)]

    def evaluation_transform(self) -> Callable:
        """The transform of validation and test images."""
        if self.transform:
            return self.transform
        resize_size, crop_size = self.sizes
        return evaluation_transform(resize_size=resize_size, crop_size=crop_size)

    def in_words(self, num_images: int) -> str:
        """The length of the training in words."""
        steps, images = self.num_steps, self.global_batch_size
        passes = steps * images / num_images
        line = f"{steps:,} steps of {images:,} images, {passes:.4g} passes over {num_images:,}"
        if passes > 100:
            line += "; epoch_length=null makes an epoch one pass"
        return line

    def protocol(self) -> dict[str, object]:
        """What the trained heads depend on."""
        settled = self.epoch_length is not None
        steps = self.num_steps if settled else f"{self.epochs} x one pass, {LONGEST_EPOCH} at most"
        seen = self.num_steps * self.global_batch_size if settled else steps
        crop = self.crop_size or "the net's own size"
        words: dict[str, object] = {
            "iterations": steps,
            "global_batch_size": self.global_batch_size,
            "images_seen": seen,
            "epochs": self.epochs,
            "epoch_length": self.epoch_length,
            "sampler": self.sampler,
            "seed": self.seed,
            "precision": self.precision,
            "train_transform": f"random resized crop {crop}, mirrored at random, bicubic"
            if self.train_transform is None
            else transform_in_words(self.train_transform, None, None),
            "transform": transform_in_words(self.transform, self.resize_size, self.crop_size),
            "on_error": self.on_error,
        }
        # In the published orders, the images of a step depend on the number of processes.
        if self.sampler != "shuffled":
            words |= {"world_size": distributed.world_size(), "batch_size": self.micro_batches[0]}
        return words


class FrozenFeatures:
    """Computes the features of a frozen net under the autocast of `precision`.

    `check` raises UserError if any features were not finite; on the CPU every call does.
    """

    def __init__(self, net: Backbone, layers: Sequence[int], precision: str) -> None:
        self.net, self.layers, self.dtype = net, tuple(layers), autocast_of(net, precision)
        self.device = device_of(net)
        self.calls, self.broken = 0, torch.zeros((), dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Features]:
        """Features of the blocks, earliest first."""
        images = images.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            features = features_of(self.net, images, self.layers)
        self.calls += 1
        parts = [part for block in features for part in (block.cls, block.patches)]
        sums = [part.sum(dtype=torch.float32) for part in parts if part is not None]
        fine = torch.stack(sums).isfinite().all()  # a sum is finite if all its terms are
        self.broken = self.broken.where(fine | (self.broken > 0), self.calls)
        if self.device.type == "cpu":  # on a GPU this would synchronise in every call
            self.check()
        return features

    def check(self) -> None:
        """UserError that names the first batch, of all seen, with features that are not finite."""
        if number := int(self.broken):
            raise UserError(f"probes need finite features; some of batch {number} are inf or nan")


def train_heads(
    heads: Heads,
    frozen: Callable[[Tensor], list[Features]],
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    schedule: Schedule,
    num_steps: int,
    first_step: int = 0,
    accumulation: int = 1,
    images_per_step: int = 1,
    label: str = "probe",
) -> Iterator[int]:
    """Train the heads and yield the number of each finished step; every rank must exhaust this.

    The rate of a parameter group at a step is its `initial_lr` times `schedule(step)`. Gradients
    are means over the images of all ranks.
    """
    steps = track(
        range(first_step, num_steps),
        total=(num_steps - first_step) * images_per_step,
        label=f"{label}, training images",
        size=lambda _: images_per_step,
        shown=distributed.is_main(),
    )
    for step in steps:
        for _ in range(accumulation):
            images, labels = next(batches)
            _accumulate(heads, frozen(images), labels, share=1 / accumulation)
        for parameter in heads.parameters():
            assert parameter.grad is not None
            parameter.grad = distributed.all_reduce_mean(parameter.grad)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(step)
        optimizer.step()
        optimizer.zero_grad()
        yield step


@torch.inference_mode()
def judge_heads(
    heads: Heads,
    frozen: Callable[[Tensor], list[Features]],
    exam: Exam,
    training: HeadTraining,
    *,
    label: str = "probe",
) -> tuple[dict[int, Tensor], int]:
    """Fractions correct by k, [H] or by class [H C], and the number of images read, on every rank.

    Every rank must call this. Every image counts once over all ranks.
    """
    mapping = exam.mapping
    columns = heads.num_classes if mapping is None else len(mapping)
    device = heads.loss_weights.device
    counts = make_counts(exam.metric, len(heads.names), columns, device=device)
    read = 0
    for images, labels, indices in own_batches(
        exam.dataset,
        training.evaluation_transform(),
        training.batch_size,
        call=frozen,
        num_workers=training.num_workers,
        on_error=training.on_error,
        label=f"{label}, {exam.name}",
    ):
        logits = heads(heads.read(frozen(images)))
        logits = logits if mapping is None else logits[..., mapping.to(device)]
        right = labels if exam.answers is None else exam.answers[indices]
        counts.add(logits, right.to(device))
        read += len(labels)
    counts.reduce()
    found = {k: fractions.cpu() for k, fractions in counts.fractions(exam.metric).items()}
    return found, sum(distributed.gather_objects(read))


def best_head(top1: Tensor) -> int:
    """Index of the highest of the fractions [H], the first one on a tie."""
    values = top1.tolist()
    return values.index(max(values))


@torch.enable_grad()
def _accumulate(heads: Heads, features: list[Features], labels: Tensor, *, share: float) -> None:
    logits = heads(heads.read(features))
    losses = head_losses(logits, labels.to(logits.device, non_blocking=True))
    (losses @ heads.loss_weights * share).backward()


def _stack(samples: list[tuple[Tensor, int]], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)
