"""Training of a symmetrised classifier: its aggregator, its head, or all of it.

A frozen backbone gives every image the same embeddings in every epoch, so they are computed once.

Letters in shapes: N images, B images of a batch, T copies, D channels of the embedding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.posthoc.aggregators import LearnedAttention
from baselines.posthoc.symmetrized import Symmetrized
from utils.data.images import ImageDataset
from utils.data.loaders import evaluation_batches, training_batches
from utils.errors import UserError
from utils.randomness import ShieldedBatches, preserved_randomness, seed_everything
from utils.ranges import check_counts, check_range, check_sizes
from vit.backbone import device_of, eval_mode


class Embedded(NamedTuple):
    """Inputs of the head of a classifier for a data set."""

    z: Tensor  # [N T D] float32, on the host
    labels: Tensor  # [N] int64


@dataclass(frozen=True)
class Augmented:
    """An augmentation, from image to image, and the transform that follows it."""

    augmentation: Callable
    transform: Callable

    def __call__(self, image: Image) -> Tensor:
        """Augment one image and convert it; TypeError if the augmentation already converts."""
        found = self.augmentation(image)
        if not isinstance(found, Image):
            raise TypeError(
                "the augmentation of a post-hoc training gives images, which are normalised after "
                f"it; this one gives {type(found).__name__}"
            )
        return self.transform(found)


class Fitted(NamedTuple):
    """Result of a training."""

    epochs: int
    best_epoch: int  # 0: nothing was better than the start
    validation_accuracy: float  # percent, at that epoch
    cached: bool  # whether embeddings were computed once


class PosthocTraining:
    """Cross entropy on the joined logits; the best epoch on the validation images is kept.

    epochs: None is 25, or 60 for learned attention, as published. augmentation: of the training
    images, from image to image, before the transform; with None and a frozen backbone
    embeddings are computed only once. optimizer: called with the parameters; None is Adam.
    Departs from the published training: frozen parts stay in evaluation mode, embeddings of frozen
    backbones are not computed anew, and everything random follows the seed.
    """

    def __init__(
        self,
        *,
        lr: float = 5e-4,
        epochs: int | None = None,
        batch_size: int = 128,
        weight_decay: float = 0.0,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        augmentation: Callable | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        check_counts(1, batch_size=batch_size)
        check_counts(num_workers=num_workers, seed=seed)
        check_sizes(epochs=epochs)
        check_range("lr", lr)
        check_range("weight_decay", weight_decay)
        self.lr, self.epochs, self.batch_size = lr, epochs, batch_size
        self.weight_decay, self.augmentation = weight_decay, augmentation
        self.optimizer = optimizer or torch.optim.Adam
        self.num_workers, self.seed = num_workers, seed

    def __call__(
        self,
        net: Symmetrized,
        train: ImageDataset,
        validation: ImageDataset,
        *,
        transform: Callable,
        shown: Callable[[str], None] = print,
        embedded: tuple[Embedded, Embedded] | None = None,
    ) -> Fitted:
        """Train what `net.trained` names, in place; UserError if that is nothing.

        embedded: of both data sets, if the caller has them already from the same frozen backbone.
        """
        if net.trained == "none" or not any(p.requires_grad for p in net.parameters()):
            raise UserError(f"trained={net.trained} leaves nothing to train")
        with preserved_randomness():
            seed_everything(self.seed)  # of dropout, stochastic depth and single copies
            return self._fit(net, train, validation, transform, shown, embedded)

    def _fit(
        self,
        net: Symmetrized,
        train: ImageDataset,
        validation: ImageDataset,
        transform: Callable,
        shown: Callable[[str], None],
        embedded: tuple[Embedded, Embedded] | None,
    ) -> Fitted:
        epochs = self.epochs or (60 if isinstance(net.aggregator, LearnedAttention) else 25)
        cached = net.trained != "all" and self.augmentation is None
        if net.trained == "all":
            judged = partial(_images, validation, transform, self.batch_size, self.num_workers)
        else:
            stored = embedded or self.embed_both(net, train, validation, transform, cached)
            judged = partial(_batches_of, stored[1], self.batch_size)
        batches = (
            self._of_cache(stored[0], net) if cached else self._of_images(net, train, transform)
        )
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = self.optimizer(trained, lr=self.lr, weight_decay=self.weight_decay)
        best, best_epoch, kept = accuracy(net, judged()), 0, _state(net)
        for epoch in range(1, epochs + 1):
            loss = self._epoch(net, optimizer, batches(epoch))
            found = accuracy(net, judged())
            if found > best:
                best, best_epoch, kept = found, epoch, _state(net)
            if epoch == epochs or epoch % max(1, epochs // 5) == 0:
                shown(f"epoch {epoch} of {epochs}: loss {loss:.4f}, validation {found:.2f} %")
        net.load_state_dict(kept)
        net.eval()
        return Fitted(epochs, best_epoch, best, cached)

    def _epoch(
        self, net: Symmetrized, optimizer: torch.optim.Optimizer, batches: Iterator
    ) -> float:
        net.train()
        total, count = 0.0, 0
        for source, labels in batches:
            loss = F.cross_entropy(answer(net, source), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total, count = total + float(loss.detach()) * len(labels), count + len(labels)
        return total / max(count, 1)

    def embed_both(
        self,
        net: Symmetrized,
        train: ImageDataset,
        validation: ImageDataset,
        transform: Callable,
        cached: bool = True,
    ) -> tuple[Embedded, Embedded]:
        """Embeddings of a frozen backbone: training (unless augmented) and validation images."""
        sizes = self.batch_size, self.num_workers
        judged = embed(net, validation, transform, *sizes)
        return (embed(net, train, transform, *sizes) if cached else judged), judged

    def _of_cache(
        self, stored: Embedded, net: Symmetrized
    ) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
        """Shuffled batches of embeddings [B T D] of an epoch."""
        device = device_of(net)

        def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            generator = torch.Generator().manual_seed(self.seed * 1000003 + epoch)
            order = torch.randperm(len(stored.labels), generator=generator)
            for part in order.split(self.batch_size):
                yield stored.z[part].to(device), stored.labels[part].to(device)

        return batches

    def _of_images(
        self, net: Symmetrized, train: ImageDataset, transform: Callable
    ) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
        """Shuffled batches of images [B C H W] of an epoch."""
        device, steps = device_of(net), max(1, len(train) // self.batch_size)
        if self.augmentation is not None:
            transform = Augmented(self.augmentation, transform)
        endless = ShieldedBatches(
            training_batches(
                train,
                transform,
                _collate,
                self.batch_size,
                seed=self.seed,
                num_workers=self.num_workers,
            )
        )

        def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            for _ in range(steps):
                images, labels = next(endless)
                yield images.to(device), labels.to(device)

        return batches


def answer(net: Symmetrized, source: Tensor) -> Tensor:
    """Logits of images [B C H W], or of embeddings of all their copies [B T D].

    With `one_copy` a net in training reads one random copy of each, of embeddings too.
    """
    if source.ndim != 3:
        return net(source)
    if net.training and net.one_copy:
        rows = torch.arange(len(source), device=source.device)
        drawn = torch.randint(source.shape[1], (len(source),), device=source.device)
        source = source[rows, drawn][:, None]
    return net.aggregate(source)


@torch.no_grad()
def accuracy(net: Symmetrized, batches: Iterator[tuple[Tensor, Tensor]]) -> float:
    """Percent of images, or embeddings, whose label is the highest logit."""
    net.eval()
    device, hits, count = device_of(net), 0, 0
    for source, labels in batches:
        hits += int((answer(net, source.to(device)).argmax(dim=1).cpu() == labels.cpu()).sum())
        count += len(labels)
    return 100 * hits / max(count, 1)


@torch.no_grad()
def embed(
    net: Symmetrized,
    dataset: ImageDataset,
    transform: Callable,
    batch_size: int = 128,
    num_workers: int = 0,
) -> Embedded:
    """Embeddings of all copies of all images, computed once in evaluation mode."""
    device = device_of(net)
    with eval_mode(net):
        found = [
            (net.embeddings(images.to(device)).float().cpu(), labels)
            for images, labels in _images(dataset, transform, batch_size, num_workers)
        ]
    return Embedded(*(torch.cat(part) for part in zip(*found, strict=True)))


def _images(
    dataset: ImageDataset, transform: Callable, batch_size: int, num_workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    for images, labels, _ in evaluation_batches(
        dataset, transform, batch_size, num_workers=num_workers
    ):
        yield images, labels


def _batches_of(stored: Embedded, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(stored.z.split(batch_size), stored.labels.split(batch_size), strict=True)


def _collate(samples: list[tuple[Tensor, int]], generator: torch.Generator) -> tuple[Tensor, Any]:
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)


def _state(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
