"""The per-pixel linear probe of DINOv3 (Siméoni et al. 2025): a linear head on frozen patches.

Letters: C classes, S side of a window, H W size of a mask.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.features.dataset import PRECISIONS, evaluating
from evaluation.pictures.segmentation import draw_segmentation
from evaluation.progress import track_share
from evaluation.results import print_table
from evaluation.sample import spread
from evaluation.segmentation.dense_head import PixelHead, PixelHeadSettings
from evaluation.segmentation.dense_training import (
    PixelHeadRun,
    patches_of,
    upsample,
)
from evaluation.segmentation.dense_transforms import (
    ClassTable,
    Pairs,
    WholeImage,
    round_to_patches,
)
from evaluation.segmentation.iou import Confusion, Scores
from evaluation.segmentation.sliding_window import corners, slide
from utils import distributed
from utils.data.loaders import evaluation_batches
from utils.data.segmentation import SegmentationDataset
from utils.ranges import check_counts, check_word
from utils.results_file import write_results
from vit.backbone import Backbone

NAME = "seg_linear"


class PixelLinearProbe:
    """Evaluate a frozen net by a linear layer on its patches, trained on and scored by pixels.

    The head is dropout of channels, batch normalisation and a 1 x 1 convolution on the last block's
    map after the final norm. In training, logits are upsampled to the crop; the cross-entropy is
    averaged over all pixels, with ignored ones as 0; the optimiser is AdamW. In evaluation, windows
    of `crop_size` every `stride` pixels cover the whole image, whose shorter side is `image_size`,
    and their mean logits are upsampled to the mask. Both sizes are rounded to multiples of the
    patch size. A step is the same on any number of GPUs (evaluation/segmentation/dense_head.py);
    accumulation keeps the `effective_batch_size`. A stopped probe resumes from its last checkpoint,
    bit for bit.
    Departs from DINOv3: the head is evaluated once, after the last step; DINOv3 evaluates every
    5000 steps and reports the best, and so selects on the images that it reports. `precision` is
    the net's alone: the head stays in float32.
    """

    splits = ()  # no split of the config's data: this probe has its own data sets

    def __init__(
        self,
        *,
        train: SegmentationDataset,
        test: SegmentationDataset,
        crop_size: int = 512,
        image_size: int = 512,
        stride: int = 341,
        scale: tuple[float, float] = (0.5, 2.0),
        hflip_probability: float = 0.5,
        photometric: bool = True,
        num_steps: int = 40_000,
        warmup_steps: int = 1500,
        effective_batch_size: int = 16,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-3,
        dropout_rate: float = 0.1,
        seed: int = 0,
        batch_size_per_gpu: int = 2,
        num_workers: int = 6,
        precision: str = "fp32",
        checkpoint_every: int = 1000,
        num_overlays: int = 6,
    ) -> None:
        check_word("precision", precision, PRECISIONS)
        check_counts(1, batch_size_per_gpu=batch_size_per_gpu)
        check_counts(
            num_workers=num_workers, checkpoint_every=checkpoint_every, num_overlays=num_overlays
        )
        self.recipe = PixelHeadSettings(
            crop_size=crop_size,
            image_size=image_size,
            scale=(float(scale[0]), float(scale[-1])),
            hflip_probability=hflip_probability,
            photometric=photometric,
            num_steps=num_steps,
            warmup_steps=warmup_steps,
            effective_batch_size=effective_batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            dropout_rate=dropout_rate,
            seed=seed,
        )
        if image_size < crop_size or not 0 < stride <= crop_size:
            raise ValueError(
                f"image_size {image_size} must be at least crop_size {crop_size}, and stride "
                f"{stride} lie between 1 and crop_size"
            )
        if train.class_names != test.class_names or train.ignore_labels != test.ignore_labels:
            raise ValueError(f"train and test have different classes: {train!r}, {test!r}")
        self.train, self.test = train, test
        self.table = ClassTable(len(train.class_names), train.ignore_labels)
        self.stride, self.precision = stride, precision
        self.batch_size_per_gpu, self.num_workers = batch_size_per_gpu, num_workers
        self.checkpoint_every, self.num_overlays = checkpoint_every, num_overlays

    def __call__(
        self, net: Backbone, data: Mapping[str, Any], output_dir: Path, step: int = 0
    ) -> dict[str, float]:
        """Train, evaluate and write the head; every rank must call this. Percentages by flat name.

        Writes results.json, seg_linear_head.pt, seg_linear_steps.jsonl and overlays.png.
        """
        folder = Path(output_dir)
        head = self.fit(net, folder, step)
        scores, shown = self.evaluate(net, head)
        figures = {
            "pixel_linear_miou": 100 * scores.miou,
            "pixel_linear_acc": 100 * scores.acc,
            "pixel_linear_miou_classes": 100 * scores.miou_classes,
        }
        if distributed.is_main():
            self._write(folder, head, scores, figures, shown, self._used(net) | {"step": step})
        distributed.barrier()
        return figures

    def fit(self, net: Backbone, folder: Path, step: int = 0) -> PixelHead:
        """Train the head, resuming from a checkpoint of the same training in `folder`, if any."""
        with evaluating(net, self.precision) as device:
            used = self._used(net)
            recipe = replace(
                self.recipe, crop_size=used["crop_size"], image_size=used["image_size"]
            )
            training = PixelHeadRun(
                net,
                self.train,
                self.table,
                recipe,
                folder=folder,
                name=NAME,
                device=device,
                batch_size_per_gpu=self.batch_size_per_gpu,
                num_workers=self.num_workers,
                checkpoint_every=self.checkpoint_every,
                key=f"{self.precision}, step {step}",
            )
            return training.run()

    @torch.no_grad()
    def evaluate(self, net: Backbone, head: PixelHead) -> tuple[Scores, dict[int, np.ndarray]]:
        """Scores on the test set, and predicted labels [H W] by index of the images to be shown.

        Every rank must call this, and gets the scores and predictions over all ranks.
        """
        used, shown = self._used(net), {}
        chosen = set(spread(len(self.test), self.num_overlays))
        with evaluating(net, self.precision) as device:
            confusion = Confusion(device)
            labels = torch.from_numpy(self.table.labels).to(device)
            images = self._images(used["image_size"])
            # A sharded net gathers its weights in every call: all ranks make the same number.
            for _ in range(-(-len(self.test) // distributed.world_size())):
                image, mask, index = next(images, (None, None, -1))
                calls = self._calls(image, used["crop_size"])
                most = int(distributed.all_reduce_max(torch.tensor(calls)))
                if image is not None and mask is not None:
                    logits = self._logits(net, head, image.to(device), used["crop_size"])
                    predicted = labels[upsample(logits[None], mask.shape)[0].argmax(dim=0)]
                    confusion.add(mask, predicted)
                    if index in chosen:
                        shown[index] = predicted.cpu().numpy()
                for _ in range(most - calls):
                    patches_of(net, torch.zeros(1, 3, *2 * (used["crop_size"],), device=device))
            next(images, None)  # ends the progress line
            scores = confusion.scores(self.test.ignore_labels)
        gathered = distributed.gather_objects(shown)
        return scores, dict(sorted(pair for part in gathered for pair in part.items()))

    @property
    def protocol(self) -> dict[str, object]:
        """What the figures depend on."""
        recipe = self.recipe
        return {
            "probe": NAME,
            "feature": "patches of the last block after the final norm",
            "head": f"dropout of channels {recipe.dropout_rate}, batch norm over the whole batch, "
            "1 x 1 convolution",
            "vote": "mean logits of overlapping windows, upsampled to the mask; argmax",
            "transform": f"shorter side {recipe.image_size}, windows of {recipe.crop_size} every "
            f"{self.stride}",
            "train": repr(self.train),
            "test": repr(self.test),
            "ignore_labels": list(self.train.ignore_labels),
            "num_classes": len(self.table),
            "augmentation": f"scale {recipe.scale[0]} to {recipe.scale[1]}, crop "
            f"{recipe.crop_size}, flip {recipe.hflip_probability}"
            + (", photometric distortion" if recipe.photometric else ""),
            "optimizer": f"AdamW, rate {recipe.learning_rate}, weight decay "
            f"{recipe.weight_decay}, warm-up {recipe.warmup_steps} steps, cosine to 0",
            "num_steps": recipe.num_steps,
            "effective_batch_size": recipe.effective_batch_size,
            "seed": recipe.seed,
            "precision": self.precision,
            "selection": "none, the head after the last step",
        }

    def _used(self, net: Backbone) -> dict[str, int]:
        """Crop and image size in pixels, rounded to whole patches of a net."""
        sizes = {"crop_size": self.recipe.crop_size, "image_size": self.recipe.image_size}
        return {name: round_to_patches(size, net.patch_size) for name, size in sizes.items()}

    def _images(self, image_size: int) -> Any:
        """This rank's test images one by one: (image [3 h w], mask [H W], index)."""
        batches = evaluation_batches(
            Pairs(self.test),  # type: ignore[arg-type]  # pairs stand where images do
            WholeImage(image_size=image_size),
            1,  # they differ in size
            num_workers=self.num_workers,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        total = len(range(distributed.rank(), len(self.test), distributed.world_size()))
        label = f"{NAME}: test images"
        for (images, masks), _, indices in track_share(
            batches, total=total, label=label, size=lambda batch: len(batch[1])
        ):
            yield images[0], masks[0], int(indices[0])

    def _calls(self, image: Tensor | None, window: int) -> int:
        if image is None:
            return 0
        height, width = image.shape[-2:]
        windows = corners(height, width, window, self._stride(window))
        return -(-len(windows) // self.batch_size_per_gpu)

    def _logits(self, net: Backbone, head: PixelHead, image: Tensor, window: int) -> Tensor:
        """Mean logits [C h w] of an image [3 h w]."""

        def predict(views: Tensor) -> Tensor:
            patches = patches_of(net, views)
            with torch.autocast(views.device.type, enabled=False):
                return upsample(head(patches), views.shape[-2:])

        return slide(
            predict,
            image,
            window=window,
            stride=self._stride(window),
            batch_size=self.batch_size_per_gpu,
        )

    def _stride(self, window: int) -> int:
        """The stride, at most the window, so that a window rounded down leaves no gap."""
        return min(self.stride, window)

    def _write(
        self,
        folder: Path,
        head: PixelHead,
        scores: Scores,
        figures: dict[str, float],
        shown: dict[int, np.ndarray],
        used: dict[str, int],
    ) -> None:
        names = self.test.class_names
        per_class = {names[label]: 100 * iou for label, iou in scores.class_iou.items()}
        protocol = self.protocol | {"used": used}
        everything = figures | {"IoU": per_class}
        write_results(folder, NAME, protocol=protocol, figures=everything)
        # On the host, so that a plain torch.load works on a machine without a GPU.
        state = {name: value.cpu() for name, value in head.state_dict().items()}
        torch.save(state, folder / f"{NAME}_head.pt")
        if shown:
            draw_segmentation(
                [self.test.read(index) for index in shown],
                [self.test.read_mask(index) for index in shown],
                list(shown.values()),
                folder / "overlays.png",
                class_names=names,
                ignore=self.test.ignore_labels,
            )
        shutil.rmtree(folder / f"{NAME}_checkpoints", ignore_errors=True)
        rows = [*figures.items(), *((f"IoU {name}", iou) for name, iou in per_class.items())]
        words = "; ".join(f"{key}: {value}" for key, value in protocol.items())
        print_table(f"per-pixel linear probe of {self.test!r}", (NAME, "%"), rows, protocol=words)
