"""Train the per-pixel linear probe's head on crops, with checkpoints to resume from.

Letters: B images of a micro-batch, S side of a crop, h w grid of patches, D channels.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import default_collate

from evaluation.features.cache import net_fingerprint
from evaluation.features.reading import patch_tokens
from evaluation.progress import say, track
from evaluation.segmentation.dense_head import (
    PixelHead,
    PixelHeadSettings,
    drop_channels,
    learning_rate,
    sum_over_ranks,
    whole_batch_statistics,
)
from evaluation.segmentation.dense_transforms import IGNORED, ClassTable, Pairs, TrainingCrop
from utils import distributed
from utils.checkpoints.checkpoint import Checkpoints
from utils.data.loaders import training_batches
from utils.data.segmentation import SegmentationDataset
from utils.effective_batch import shared_batches
from vit.backbone import Backbone

LOG_EVERY = 50


class PixelHeadRun:
    """One training of a head on a frozen net; the net is in evaluation mode, under its autocast.

    The files in `folder` and the printed lines begin with `name`. A training resumes from a
    checkpoint only if `recipe`, data, `key` and the net itself are unchanged.
    """

    def __init__(
        self,
        net: Backbone,
        dataset: SegmentationDataset,
        table: ClassTable,
        recipe: PixelHeadSettings,
        *,
        folder: Path,
        name: str,
        device: torch.device,
        batch_size_per_gpu: int,
        num_workers: int,
        checkpoint_every: int,
        key: str = "",
    ) -> None:
        self.net, self.dataset, self.recipe, self.name = net, dataset, recipe, name
        self.device, self.num_workers = device, num_workers
        self.micro_batch, self.accumulation = shared_batches(
            recipe.effective_batch_size, batch_size_per_gpu, distributed.world_size()
        )
        self.table = table
        self.head = PixelHead(net.embed_dim, len(table), seed=recipe.seed).to(device)
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.log_file = folder / f"{name}_steps.jsonl"
        self.checkpoints = Checkpoints(
            folder / f"{name}_checkpoints",
            every=checkpoint_every,
            keep_last=1,
            fingerprint=json.dumps([asdict(recipe), repr(dataset), key, net_fingerprint(net)]),
        )

    @torch.enable_grad()
    def run(self) -> PixelHead:
        """Train to the last step and return the head; every rank must call this."""
        recipe, first = self.recipe, self._resume()
        self._start_log(first)
        batches = self._batches(first)
        steps = track(
            range(first, recipe.num_steps),
            total=(recipe.num_steps - first) * recipe.effective_batch_size,
            label=f"{self.name}: crops",
            size=lambda _: recipe.effective_batch_size,
            shown=distributed.is_main(),
        )
        for step in steps:
            rate = learning_rate(
                step,
                base=recipe.learning_rate,
                num_steps=recipe.num_steps,
                warmup_steps=recipe.warmup_steps,
            )
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = self._gradients(batches)
            self.optimizer.step()
            last = step + 1 == recipe.num_steps
            if step % LOG_EVERY == 0 or last:
                self._log(step, loss, rate)
            if self.checkpoints.due(step + 1) and not last:
                self._save(step + 1)
        return self.head

    def _gradients(self, batches: Iterator) -> Tensor:
        """Compute a step's gradients over its micro-batches and all ranks; returns its loss."""
        parts = []
        for _ in range(self.accumulation):
            images, targets, seeds = next(batches)
            patches = patches_of(self.net, images.to(self.device, non_blocking=True))
            targets = targets.to(self.device, non_blocking=True)
            parts.append((drop_channels(patches, seeds, self.recipe.dropout_rate), targets))
        statistics = whole_batch_statistics([patches for patches, _ in parts])
        self.head.remember(statistics)
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        with torch.autocast(self.device.type, enabled=False):
            for patches, targets in parts:
                logits = upsample(self.head.classify(patches, statistics), targets.shape[1:])
                loss = nn.functional.cross_entropy(
                    logits, targets.long(), ignore_index=IGNORED, reduction="sum"
                )
                loss = loss / (self.recipe.effective_batch_size * targets[0].numel())
                loss.backward()
                total += loss.detach()
        return sum_over_ranks(self.head, total)

    def _batches(self, first: int) -> Iterator:
        recipe = self.recipe
        return training_batches(
            Pairs(self.dataset),  # type: ignore[arg-type]  # pairs stand where images do
            TrainingCrop(self.table, recipe),
            _collate,
            self.micro_batch,
            first_step=first,
            seed=recipe.seed,
            num_workers=self.num_workers,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            micro_batches=self.accumulation,
        )

    def _resume(self) -> int:
        found = self.checkpoints.load()
        if found is None:
            return 0
        step, parts, notes = found
        same = parts.description["fingerprint"] == self.checkpoints.fingerprint
        where = f"the checkpoint of step {step} in {self.checkpoints.folder}"
        told = (
            f"going on from {where}" if same else f"{where} is of another net or protocol, so anew"
        )
        if distributed.is_main():
            for note in [*notes, told]:
                say(f"{self.name}: {note}")
        if not same:
            return 0
        self.head.load_state_dict(parts["head"])
        self.optimizer.load_state_dict(parts["optimizer"])
        return step

    def _save(self, step: int) -> None:
        parts = {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}
        problem = self.checkpoints.save(step, parts)
        if problem and distributed.is_main():
            say(f"{self.name}: {problem}")

    def _start_log(self, first: int) -> None:
        if not distributed.is_main():
            return
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        old = self.log_file.read_text().splitlines() if first and self.log_file.exists() else []
        kept = [line for line in old if json.loads(line)["step"] < first]
        self.log_file.write_text("".join(f"{line}\n" for line in kept))

    def _log(self, step: int, loss: Tensor, rate: float) -> None:
        if distributed.is_main():
            with self.log_file.open("a") as file:
                line = {"step": step, "loss": float(loss), "learning_rate": rate}
                file.write(json.dumps(line) + "\n")


@torch.no_grad()
def patches_of(net: Backbone, images: Tensor) -> Tensor:
    """The map of the last block after the final norm [B h w D], float32; UserError without it."""
    return patch_tokens(net, images).float()


def upsample(logits: Tensor, size: torch.Size) -> Tensor:
    """Logits [B C h w] at another height and width, bilinear."""
    return nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def _collate(samples: list, generator: Generator) -> list[Tensor]:
    """(crops [B 3 S S], classes [B S S], seeds [B])."""
    return default_collate([sample for sample, _ in samples])
