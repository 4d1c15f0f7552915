"""The DeiT III recipe: a classifier learns the labels of strongly augmented, mixed images.

Touvron et al. 2022, "DeiT III: Revenge of the ViT". Letters in shapes: B images of a micro-batch,
S pixels a side, C classes.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deit.augment import ThreeAugment, TimmAugmentation
from deit.fast_augment import FastThreeAugment
from deit.losses import (
    LOSSES,
    Distillation,
    classification_loss,
    cosub_loss,
    present_classes,
)
from deit.mixing import Collate, Mixing
from deit.param_groups import freeze, param_groups
from deit.schedules import Schedules
from utils.data.classes import mismatch
from utils.data.colour_plan import finished
from utils.data.images import ImageDataset
from utils.data.loaders import check_loading, training_batches
from utils.distributed import average_buffers, is_main, rank, world_size
from utils.effective_batch import count_steps, micro_batches
from utils.moving_average import Held, MovingAverage
from utils.parallel import blocks_of
from utils.precision import at_least_float32
from utils.ranges import check_range, check_word
from vit.finetune import head_of, load_adapted
from vit.weights import read_metadata

EXPORTS = ("model", "ema")

logger = logging.getLogger(__name__)


class DeiT(nn.Module):
    """A classifier, its moving average, and a teacher if there is one (see `utils.recipe`).

    backbone: makes the classifier; called as `backbone(drop_path_rate=...)`, it gives logits.
        dataset: gives PIL images with labels.
    epochs, epoch_length: a run has epochs * epoch_length steps; epoch_length <= 0 means one pass
        over the data set at the effective batch.
    effective_batch_size: images per step over all processes. Where given, it is kept: accumulation
        follows from it, and numbers that do not make it are refused.
    loss, smoothing: see `deit.losses.classification_loss`. mixing: None leaves images apart.
    augmentation: any callable that makes a tensor [3 S S] of a PIL image; one that has
        `finish(batch)` ends on the device, one that `takes_encoded` gets the undecoded file.
    ema_decay: of the moving average of parameters and buffers; 0 for none. export: what is saved
        and probed, `model` (as published, where the average was saved but never judged) or `ema`.
    trainable, layerwise_decay: for fine-tuning, see `deit.param_groups`. decay_vectors: biases and
        norms decay too, as an optimiser does that is given all parameters at once.
    train_mode: false trains the classifier in evaluation mode, without dropout and drop path and
        with fixed batch statistics, as DeiT fine-tunes.

    A classifier with a method `follow_training(step, epoch_length)` has it called at each step; the
    numbers by name that it returns are shown beside the losses.
    """

    def __init__(
        self,
        *,
        backbone: Callable[..., nn.Module],
        dataset: ImageDataset,
        epochs: float = 400,
        epoch_length: int = 0,
        batch_size_per_gpu: int = 64,
        accumulation: int | None = None,
        effective_batch_size: int | None = None,
        drop_path_rate: float | None = 0.1,
        loss: str = "bce",
        smoothing: float = 0.0,
        cosub: bool = False,
        distillation: Distillation | None = None,
        mixing: Mixing | None = None,
        augmentation: ThreeAugment | FastThreeAugment | TimmAugmentation | None = None,
        ema_decay: float = 0.99996,
        export: str = "model",
        trainable: str = "all",
        layerwise_decay: float = 1.0,
        decay_vectors: bool = False,
        train_mode: bool = True,
        schedules: Schedules | None = None,
        sampler: str = "repeated_augmentation",
        num_workers: int = 10,
        on_error: str = "raise",
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_loss(loss, smoothing, cosub, distillation)
        check_range("ema_decay", ema_decay, 0, 1, ends="[)")
        check_range("layerwise_decay", layerwise_decay, 0, 1)
        if export not in EXPORTS or (export == "ema" and not ema_decay):
            raise ValueError(f"export is {' or '.join(EXPORTS)}, the latter with ema_decay above 0")
        self.batch_size_per_gpu = batch_size_per_gpu
        self.accumulation = micro_batches(
            effective_batch_size, batch_size_per_gpu, world_size(), accumulation
        )
        batch_size = batch_size_per_gpu * self.accumulation * world_size()
        self.epoch_length, self.total_steps = count_steps(
            epochs, epoch_length, images=len(dataset), batch_size=batch_size
        )
        if mixing is not None and batch_size_per_gpu % 2:
            raise ValueError(
                f"mixing pairs the images of a batch: batch_size_per_gpu {batch_size_per_gpu} "
                "must be even"
            )
        self.dataset, self.loss, self.smoothing, self.cosub = dataset, loss, smoothing, cosub
        self.augmentation = augmentation or ThreeAugment()
        self.loading: dict[str, Any] = {
            "sampler": sampler,
            "num_workers": num_workers,
            "on_error": on_error,
            "seed": seed,
        }
        check_loading(**self.loading)
        self.trainable, self.layerwise_decay = trainable, layerwise_decay
        self.decay_vectors, self.train_mode = decay_vectors, train_mode
        self.ema_decay, self.export = ema_decay, export

        keywords = {} if drop_path_rate is None else {"drop_path_rate": drop_path_rate}
        self.model = backbone(**keywords)
        self.num_classes = _count_classes(self.model, dataset)
        self.mix = mixing.build(self.num_classes, smoothing) if mixing else None
        self.distillation = distillation
        if distillation is not None:
            _use_two_heads(self.model)
        self.ema: nn.Module | None = None
        self._start_from_model()

        self.schedules = (schedules or Schedules()).build(
            epochs=epochs, epoch_length=self.epoch_length, batch_size=batch_size
        )
        self.train()

    # What the loop calls.

    @property
    def exported(self) -> nn.Module:
        """The network that is exported and probed."""
        return self.ema if self.export == "ema" and self.ema is not None else self.model

    @property
    def image_size(self) -> int | None:
        """Pixels a side of the images, if the augmentation tells."""
        return getattr(self.augmentation, "input_size", None)

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups of what is trained of the classifier."""
        return param_groups(
            self.model, layerwise_decay=self.layerwise_decay, decay_vectors=self.decay_vectors
        )

    def clipped_parts(self) -> dict[str, nn.Module]:
        """The whole classifier; LAMB clips by itself, its configs set training.clip_grad=null."""
        return {"model": self.model}

    def parallelize(self, wrap: Callable[..., nn.Module]) -> None:
        """Let the loop shard and compile classifier, moving average and teacher."""
        self.model = wrap(self.model, units=blocks_of(self.model))
        if self.ema is not None:
            self.ema = wrap(self.ema, units=blocks_of(self.ema))
        self._look_up()
        if self.distillation is not None:
            teacher = self.distillation.teacher
            self.distillation.teacher = wrap(teacher, units=blocks_of(teacher))
        colours = getattr(self.augmentation, "colours", None)
        if colours is not None:
            wrap(colours)

    def batches(self, first_step: int) -> Iterator[dict[str, Tensor]]:
        """Micro-batches (see `deit.mixing.Collate`) from a step on, without end."""
        # A finished run that is started again has no step left, only the last one to judge.
        self._follow(max(first_step - 1, 0))
        return training_batches(
            self.dataset,
            self.augmentation,
            Collate(),
            self.batch_size_per_gpu,
            first_step=first_step,
            rank=rank(),
            world_size=world_size(),
            micro_batches=self.accumulation,
            **self.loading,
        )

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Finish the augmentation on the device, and mix the images."""
        batch = finished(self.augmentation, batch)
        return batch if self.mix is None else self.mix(batch)

    def losses(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Losses of a micro-batch; `loss` is optimised, the rest is shown."""
        told = self._follow(step)
        images = batch["images"]
        logits, student = self._logits(torch.cat([images, images]) if self.cosub else images)
        losses = self.losses_of(logits, student, batch)
        # Filled on the device: new_tensor() would copy, and wait for all of the forward pass.
        return losses | {name: losses["loss"].new_full((), value) for name, value in told.items()}

    def losses_of(
        self, logits: Tensor, student: Tensor, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Losses of the logits [B C] of a micro-batch: the place for terms of one's own on them.

        student: the logits that learn from a teacher, of a second head, or the same. With cosub
        both are [2B C], those of one subnetwork after those of the other.
        """
        targets = batch["targets"]
        if self.cosub:
            first, second = logits.chunk(2)
            return {"loss": cosub_loss(first, second, present_classes(targets, first))}
        loss = classification_loss(logits, targets, loss=self.loss, smoothing=self.smoothing)
        if self.distillation is None:
            return {"loss": loss}
        told, alpha = self.distillation(batch["images"], student), self.distillation.alpha
        shown = {"label_loss": loss.detach(), "distillation_loss": told.detach()}
        return {"loss": (1 - alpha) * loss + alpha * told} | shown

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the average towards the classifier; each rank's batch statistics become one."""
        average_buffers(self._held.buffers())
        if self._average is not None:
            self._average.update(1 - self.ema_decay)

    def load_weights(self, path: str) -> None:
        """Start classifier and moving average from a file, published or exported.

        It may be of another resolution or of other classes; what was adapted is logged. A file that
        names its classes keeps its head only where they are those of the data set, in their order.
        """
        fresh = {name: tensor.clone() for name, tensor in self._head().items()}
        notes = load_adapted(self.model, path)
        others = mismatch(read_metadata(path), self.dataset)
        if others and any(not torch.equal(fresh[name], t) for name, t in self._head().items()):
            self.model.load_state_dict(fresh, strict=False)
            notes.append(f"head: {others}; it starts afresh")
        for note in notes if is_main() else []:
            logger.warning("%s: %s", path, note)
        self._start_from_model()

    def train(self, mode: bool = True) -> "DeiT":
        """Set the classifier's mode; average and teacher always evaluate."""
        super().train(mode)
        if not self.train_mode:
            self.model.eval()
        for part in (self.ema, self.distillation):
            if part is not None:
                part.eval()
        return self

    # Parts of the above.

    def _follow(self, step: int) -> dict[str, float]:
        """Call `follow_training` of classifier and average, if any; returns the values to show."""
        shown: dict[str, float] = {}
        for net in (self.ema, self.model):
            inner: Any = getattr(net, "net", net)
            if hasattr(inner, "follow_training"):
                shown = dict(inner.follow_training(step, self.epoch_length) or {})
        return shown

    def _start_from_model(self) -> None:
        """Freeze what is not trained and start the moving average from the classifier.

        Called again after other weights were loaded.
        """
        freeze(self.model, self.trainable)
        if self.ema_decay:
            self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self._look_up()

    def _look_up(self) -> None:
        """Find what moves after each step; called again where networks may be others."""
        self._held = Held(self.model)
        self._average = None if self.ema is None else MovingAverage(self.ema, self.model)

    def _head(self) -> dict[str, Tensor]:
        """The classifier's part of the state dict."""
        net = getattr(self.model, "net", self.model)
        prefix = f"{'' if net is self.model else 'net.'}{head_of(net)}"
        state = self.model.state_dict()
        return {n: t for n, t in state.items() if n.startswith((f"{prefix}.", f"{prefix}_dist."))}

    def _logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B C], and those that learn from a teacher: of a second head, or the same."""
        found = self.model(images)
        logits, student = found if isinstance(found, tuple) else (found, found)
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"the backbone gives {list(logits.shape[1:])} numbers per image for "
                f"{self.num_classes} classes; set backbone.num_classes={self.num_classes}"
            )
        return at_least_float32(logits), at_least_float32(student)


def _use_two_heads(model: nn.Module) -> None:
    """Have a distilled network of timm's give both heads' logits in training, adapted or not.

    As in Touvron et al. 2021; otherwise it gives their mean.
    """
    for module in model.modules():
        if hasattr(module, "set_distilled_training"):
            module.set_distilled_training(True)


def _count_classes(model: nn.Module, dataset: ImageDataset) -> int:
    """Classes of the data set, which must be the classifier's; ValueError says how to agree."""
    ours = getattr(model, "num_classes", getattr(getattr(model, "net", None), "num_classes", None))
    if not hasattr(dataset, "class_names"):  # a stand-in, to count parameters
        return int(ours or 1)
    if dataset.labels is None:
        raise ValueError(f"{dataset!r} has no labels to learn from")
    count = len(dataset.class_names) or int(dataset.labels.max()) + 1
    if ours is not None and ours != count:
        raise ValueError(
            f"{dataset!r} has {count} classes, the backbone {ours}; "
            f"set backbone.num_classes={count}"
        )
    return count


def _check_loss(
    loss: str, smoothing: float, cosub: bool, distillation: Distillation | None
) -> None:
    check_word("loss", loss, LOSSES)
    check_range("smoothing", smoothing, 0, 1, ends="[)")
    if loss == "bce" and smoothing:
        raise ValueError(
            f"smoothing {smoothing} with loss=bce would make every class a target; "
            "use smoothing=0 or loss=ce"
        )
    if cosub and (loss != "bce" or distillation is not None):
        raise ValueError("cosub goes with loss=bce and without distillation")
