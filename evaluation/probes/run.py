"""One training of heads on one net: resume from files, train, save, evaluate."""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from evaluation.probes.exams import HELD_OUT, Exam
from evaluation.probes.files import ProbeFiles, StoredHeads, load_classifier
from evaluation.probes.image_counts import count_images
from evaluation.probes.training import (
    FrozenFeatures,
    Heads,
    HeadTraining,
    judge_heads,
    train_heads,
)
from evaluation.progress import say
from utils import distributed
from utils.data.images import ImageDataset
from utils.schedules import Schedule
from vit.backbone import Backbone


class TrainableHeads(Heads, StoredHeads, Protocol):
    """Heads that can be trained, judged and stored."""


class HeadRun:
    """Trains and evaluates the heads of a probe on a frozen net.

    `schedule` multiplies the `initial_lr` of each group of the optimiser; `training` must have its
    epoch length and image sizes set.
    """

    def __init__(
        self,
        net: Backbone,
        heads: TrainableHeads,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        train_set: ImageDataset,
        training: HeadTraining,
        files: ProbeFiles,
        *,
        label: str,
    ) -> None:
        self.heads, self.optimizer, self.schedule = heads, optimizer, schedule
        self.train_set, self.training, self.files, self.label = train_set, training, files, label
        self.frozen = FrozenFeatures(net, heads.layers, training.precision)
        self.num_steps = training.num_steps
        self.left_out: dict[str, int] = {}  # images that could not be judged, by exam

    def train(self, *, resume: bool = True, classifier: str | None = None) -> Iterator[int]:
        """Train the heads and yield the number of each finished step; every rank must exhaust this.

        Resumes from the probe's own files, else starts from `classifier`, if given. Saves at the
        end of each epoch, before that step is yielded.
        """
        first = self._first_step(resume, classifier)
        if first >= self.num_steps:
            return
        length = self.training.in_words(len(self.train_set))
        self._tell(f"{self.label}: {len(self.heads.names)} heads, {length}")
        steps_per_epoch = self.training.steps_per_epoch
        batches = self.training.batches(self.train_set, first_step=first)
        for step in train_heads(
            self.heads,
            self.frozen,
            self.optimizer,
            batches,
            schedule=self.schedule,
            num_steps=self.num_steps,
            first_step=first,
            accumulation=self.training.micro_batches[1],
            images_per_step=self.training.global_batch_size,
            label=self.label,
        ):
            if (step + 1) % steps_per_epoch == 0:
                self.frozen.check()
                last = step + 1 == self.num_steps
                name = self.files.final if last else self.files.running
                self.files.unread.update(*distributed.gather_objects(set(batches.errors)))
                self.files.save(name, self.heads, self.optimizer, step)
            yield step

    def judge(self, exam: Exam) -> dict[int, Tensor]:
        """Fractions correct of every head by k; every rank must call this."""
        found, read = judge_heads(self.heads, self.frozen, exam, self.training, label=self.label)
        self.frozen.check()
        self.left_out[exam.name] = len(exam.dataset) - read
        return found

    def count_images(self, data: Mapping[str, ImageDataset]) -> dict[str, int]:
        """The counts of images for a protocol, after training and judging.

        An image of the training counts as left out if a step was to read it.
        """
        others = {name: count for name, count in self.left_out.items() if name != HELD_OUT}
        train = len(self.files.unread) + self.left_out.get(HELD_OUT, 0)
        sets = {split: data[split] for split in ("train", "val")}
        # A test set may have any name, that of a split included.
        left_out = {"train": train, "val": others.pop("val"), "": sum(others.values())}
        return count_images(sets, left_out, self.label)

    def _first_step(self, resume: bool, classifier: str | None) -> int:
        first = self.files.resume(self.heads, self.optimizer) if resume else None
        if first is not None:
            self._tell(f"{self.label}: going on after step {first} of {self.num_steps}")
            return first
        if classifier is None:
            return 0
        first = load_classifier(classifier, self.heads, self.num_steps)
        self._tell(f"{self.label}: heads of {classifier}, trained for {first} steps")
        return first

    def _tell(self, line: str) -> None:
        if distributed.is_main():
            say(line)
