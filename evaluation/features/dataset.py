"""Extract features of a data set in one pass; each rank keeps the rows of its own images.

Letters: N images, n images of this rank, D feature width, B batch.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evaluation.features.reading import features_of
from evaluation.progress import track_share
from utils import distributed
from utils.data.images import ImageDataset
from utils.data.loaders import evaluation_batches
from utils.errors import UserError
from utils.precision import float32_products_in
from utils.ranges import check_word
from vit.backbone import Backbone, device_of, eval_mode

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class FeatureSet(NamedTuple):
    """Rows ordered by the image's index in its data set."""

    features: Tensor  # [n, D] float32, or the dtype asked for
    labels: Tensor  # [n] int64, -1 where there is none
    indices: Tensor  # [n] int64, ascending


def class_token(net: Backbone, images: Tensor) -> Tensor:
    """The class token of the last block after the final norm [B, D]: what kNN reads."""
    return features_of(net, images)[0].cls


def extract_features(
    net: Backbone,
    dataset: ImageDataset,
    *,
    dtype: torch.dtype = torch.float32,
    normalized: bool = True,
    **options: Any,
) -> FeatureSet:
    """Features of this rank's share of `dataset`, on the host; every rank must call this.

    normalized: to rows of length one. The rows are allocated once and filled batch by batch, so
    that they are never in memory twice. With on_error="skip", images that cannot be read have no
    row. options: those of `walk_features`.
    """
    capacity = -(-len(dataset) // distributed.world_size())
    store: FeatureSet | None = None
    done = 0

    def keep(rows: Tensor, labels: Tensor, indices: Tensor) -> None:
        nonlocal store, done
        rows = normalize_rows(rows) if normalized else rows
        if store is None:
            store = allocate_features(capacity, rows.shape[1], dtype)
        share = slice(done, done + len(rows))
        store.features[share] = rows.to(store.features)
        store.labels[share], store.indices[share] = labels, indices
        done = share.stop

    walk_features(net, dataset, keep, **options)
    if store is None:
        return allocate_features(0, net.embed_dim, dtype)
    return _ordered(FeatureSet(*(part[:done] for part in store)))


@torch.inference_mode()
def walk_features(
    net: Backbone,
    dataset: ImageDataset,
    keep: Callable[[Tensor, Tensor, Tensor], None],
    *,
    transform: Callable,
    batch_size: int = 256,
    num_workers: int = 0,
    precision: str = "fp32",
    read: Callable[[Backbone, Tensor], Tensor] = class_token,
    on_error: str = "raise",
    label: str = "features",
    shown: bool = True,
) -> None:
    """Pass float32 rows [B D], labels [B] and indices [B] of this rank to `keep`, batch by batch.

    Every rank must call this. Rank r of R gets images r, r + R, ... in this order. `read` turns a
    batch of images into rows; `precision` is the net's autocast.
    """

    def call(images: Tensor) -> Tensor:
        return read(net, images.to(device, non_blocking=True))

    with evaluating(net, precision) as device:
        for images, labels, indices in own_batches(
            dataset,
            transform,
            batch_size,
            call=call,
            num_workers=num_workers,
            on_error=on_error,
            label=label,
            shown=shown,
        ):
            rows = call(images).float()
            check_finite(rows, indices, dataset)  # waits for the device, as `keep` would anyway
            keep(rows, labels, indices)


def own_batches(
    dataset: ImageDataset,
    transform: Callable,
    batch_size: int,
    *,
    call: Callable[[Tensor], object],
    num_workers: int = 0,
    on_error: str = "raise",
    label: str,
    shown: bool = True,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield images [B 3 H W], labels and indices of this rank's share, with a line of progress.

    Every rank must exhaust the iterator. A sharded net gathers its weights in every call, so all
    ranks must call it equally often: a rank with fewer batches calls `call` on a single image
    [1 3 H W] at the end, once for each missing batch.
    """
    world = distributed.world_size()
    share = -(-len(dataset) // world)
    batches = evaluation_batches(
        dataset,
        transform,
        batch_size,
        num_workers=num_workers,
        rank=distributed.rank(),
        world_size=world,
        on_error=on_error,
    )
    images: Tensor | None = None
    missing = -(-share // batch_size)
    for images, labels, indices in track_share(
        batches,
        total=share,
        label=label,
        size=lambda batch: len(batch[1]),
        shown=shown,
    ):
        yield images, labels, indices
        missing -= 1
    if images is None and missing:
        first = next(evaluation_batches(dataset, transform, 1, on_error=on_error), None)
        images = None if first is None else first[0]
    if images is not None:
        for _ in range(missing):
            call(images[:1])


def check_finite(rows: Tensor, indices: Tensor, dataset: ImageDataset) -> None:
    """UserError that names the first image [B] whose features [B ...] hold inf or nan."""
    # A sum is finite if all its values are; testing the sums makes no copy of the rows.
    finite = rows.flatten(1).sum(1, dtype=torch.float32).isfinite()
    if not finite.all():
        image = dataset.path(int(indices[int(finite.int().argmin())]))
        raise UserError(f"probes need finite features; some of {image} are inf or nan")


def normalize_rows(rows: Tensor) -> Tensor:
    """Rows [n, D] scaled to length one, as kNN compares them; a row of zeros stays."""
    return nn.functional.normalize(rows, dim=-1, eps=1e-12)


def allocate_features(rows: int, width: int, dtype: torch.dtype) -> FeatureSet:
    """A FeatureSet of uninitialised rows on the host."""
    return FeatureSet(
        torch.empty(rows, width, dtype=dtype),
        torch.empty(rows, dtype=torch.int64),
        torch.empty(rows, dtype=torch.int64),
    )


def gather_features(part: FeatureSet) -> FeatureSet:
    """The rows of all ranks, sorted by index, on every rank; every rank must call this."""
    if distributed.world_size() == 1:
        return part
    return _ordered(FeatureSet(*(distributed.all_gather_variable(piece) for piece in part)))


def gather_labels(part: FeatureSet) -> Tensor:
    """The labels [N] of all ranks, sorted by index, on every rank; features are not gathered."""
    return gather_features(FeatureSet(part.indices[:, None], part.labels, part.indices)).labels


def check_labelled(part: FeatureSet, split: str, probe: str) -> None:
    """UserError if a row has no label; `probe` is named in it."""
    unlabelled = part.indices[part.labels < 0]
    if len(unlabelled):
        raise UserError(
            f"{probe} needs labels, but image {int(unlabelled[0])} of the {split} set has none"
        )


def renumber(part: FeatureSet) -> FeatureSet:
    """Renumber indices over all ranks from 0 without gaps, in order; every rank must call this."""
    everyone = gather_features(FeatureSet(part.indices[:, None], part.labels, part.indices))
    return part._replace(indices=torch.searchsorted(everyone.indices, part.indices))


def autocast_of(net: Backbone, precision: str) -> torch.dtype | None:
    """The dtype of the net's autocast: that of `precision`, or of gathered sharded weights.

    FSDP may gather weights in bfloat16 (`utils.parallel`); then there is no float32 copy to use.
    """
    travels_in = getattr(net, "travels_in", None)
    if PRECISIONS[precision] is None and travels_in is not None and distributed.is_main():
        logger.warning("judged in %s, in which the sharded weights travel", travels_in)
    return PRECISIONS[precision] or travels_in


@contextmanager
def evaluating(net: Backbone, precision: str = "fp32") -> Iterator[torch.device]:
    """Eval mode and the autocast of `precision` for a `with` block; yields the net's device."""
    check_word("precision", precision, PRECISIONS)
    device, dtype = device_of(net), autocast_of(net, precision)
    with (
        eval_mode(net) if isinstance(net, nn.Module) else nullcontext(),
        torch.autocast(device.type, dtype=dtype, enabled=dtype is not None),
    ):
        yield device


@contextmanager
def full_float32_products(device: torch.device) -> Iterator[None]:
    """Disable autocast and TF32 for a `with` block; TF32 is wrong from the fourth digit on."""
    with float32_products_in("highest"), torch.autocast(device.type, enabled=False):
        yield


def _ordered(part: FeatureSet) -> FeatureSet:
    if bool((part.indices[1:] > part.indices[:-1]).all()):
        return part
    order = part.indices.argsort()
    return FeatureSet(*(piece[order.to(piece.device)] for piece in part))
