"""Class tokens, extracted once and kept on disk for all probes and later runs.

Stored are the net's tokens as they are, in float32; each probe normalises or casts them after
reading. A stored folder is reused if its `identity` equals the one asked for.
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from evaluation.features.dataset import (
    FeatureSet,
    allocate_features,
    extract_features,
    normalize_rows,
    walk_features,
)
from evaluation.features.files import (
    FeatureWriter,
    StoredFeatures,
    differences,
    is_features,
    open_features,
)
from evaluation.progress import say
from utils import distributed
from utils.data.images import ImageDataset
from utils.data.transforms import evaluation_transform
from utils.errors import UserError
from utils.layout import whole
from vit.backbone import Backbone

ASKED_AT_ONCE = 32  # files: a disk in the network answers many at once
CLASS_TOKEN = "class token of the last block after the final norm"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in the default repr of an object
_SHARDED = re.compile(r"\bFSDP(?=\w)")  # which `fully_shard` puts before the name of a class


def class_tokens(
    net: Backbone,
    dataset: ImageDataset,
    split: str,
    *,
    features_dir: str | Path | None,
    transform: Callable | None,
    resize_size: int,
    crop_size: int,
    normalized: bool,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 256,
    num_workers: int = 0,
    precision: str = "fp32",
    on_error: str = "raise",
) -> FeatureSet:
    """This rank's class tokens of one split, on the host; every rank must call this.

    transform: None is `evaluation_transform` of these sizes. With `features_dir`, tokens are read
    from a folder below it that holds the same features, or else extracted and stored there. A
    transform with the default repr cannot be identified, nor a net around such a function: their
    features are neither read nor stored. `normalized` is applied after reading.
    """
    transform_words = transform_in_words(transform, resize_size, crop_size)
    if features_dir is not None and (unknown := _unidentified_of(net, transform_words)):
        if distributed.is_main():
            say(
                f"{split} features: not kept in {features_dir}, as {unknown} has no repr that "
                "tells its settings"
            )
        features_dir = None
    options: dict[str, Any] = {
        "transform": transform
        or evaluation_transform(resize_size=resize_size, crop_size=crop_size),
        "batch_size": batch_size,
        "num_workers": num_workers,
        "precision": precision,
        "on_error": on_error,
        "label": f"{split} features",
    }
    if features_dir is None:
        return extract_features(net, dataset, dtype=dtype, normalized=normalized, **options)
    asked = identity(
        net,
        dataset,
        transform=transform_words,
        feature=CLASS_TOKEN,
        precision=precision,
        on_error=on_error,
    )
    place = distributed.broadcast_object(
        _find(Path(features_dir), split, asked) if distributed.is_main() else None
    )
    if place.problem:
        raise UserError(place.problem)
    if place.note and distributed.is_main():
        say(place.note)
    if not place.holds_them:
        store_features(net, dataset, place.folder, asked, **options)
    return read_share(open_features(place.folder), normalized=normalized, dtype=dtype)


def store_features(
    net: Backbone,
    dataset: ImageDataset,
    folder: Path,
    meta: Mapping[str, Any],
    **options: Any,
) -> None:
    """Extract into a folder, with the options of `walk_features`; every rank must call this."""
    writer = FeatureWriter(folder, dtype=meta["dtype"])
    try:
        walk_features(net, dataset, writer.add, **options)
        writer.finish(dataset, meta)
    except BaseException:
        writer.abandon()
        raise


def transform_in_words(
    transform: Callable | None, resize_size: int | None, crop_size: int | None
) -> str:
    """Describe a transform in one line for a protocol; equal transforms give equal lines.

    A size of None is the net's own (`settle_sizes`).
    """
    if transform is not None:
        return " ".join(str(transform).split())
    if crop_size is None:
        return "resize and centre crop to the net's own size, bicubic"
    return f"resize {resize_size or 'in proportion'}, centre crop {crop_size}, bicubic"


def identity(
    net: Backbone,
    dataset: ImageDataset,
    *,
    transform: str,
    feature: str,
    precision: str,
    normalized: bool = False,
    dtype: str = "float32",
    on_error: str = "raise",
) -> dict[str, Any]:
    """All that stored features depend on, as kept in meta.json; every rank must call this."""
    return {
        "net": type(net).__name__,
        "net_fingerprint": net_fingerprint(net),
        "data": _without_addresses(repr(dataset)),
        "data_fingerprint": distributed.broadcast_object(
            _data_fingerprint(dataset) if distributed.is_main() else None
        ),
        "images": len(dataset),
        "feature": feature,
        "transform": transform,
        "normalized": normalized,
        "precision": precision,
        "dtype": dtype,
        "on_error": on_error,
    }


def net_fingerprint(net: Backbone) -> str:
    """A hash of the net's modules, their settings, parameters and buffers; the one notion of a net.

    It is the same on any number of processes and for shards. What a module does not show in its
    repr and has no state of is not seen. Every rank must call this.
    """
    digest = hashlib.blake2b(digest_size=16)
    # Addresses stay in: a function that tells nothing of itself is the same net in no other run.
    words = " ".join(f"{type(net).__qualname__} {net!r}".split())
    digest.update(_SHARDED.sub("", words).encode())
    if isinstance(net, nn.Module):
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            value = whole(tensor).detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return distributed.broadcast_object(digest.hexdigest())


def unidentified(net: Backbone) -> str:
    """The part of a net's repr, one line, that tells nothing of its settings; "" if there is none.

    As of a plain function within a net, whose figures must not be taken for those of another one.
    """
    return next((line.strip() for line in repr(net).splitlines() if _ADDRESS.search(line)), "")


def _unidentified_of(net: Backbone, transform_words: str) -> str:
    """What of a net and its transform tells nothing of its settings; "" if all do."""
    return unidentified(net) or (transform_words if _ADDRESS.search(transform_words) else "")


def read_share(
    stored: StoredFeatures, *, normalized: bool, dtype: torch.dtype = torch.float32
) -> FeatureSet:
    """This rank's rows, one contiguous block, read into memory once."""
    world, rank, count = distributed.world_size(), distributed.rank(), len(stored.labels)
    start, stop = count * rank // world, count * (rank + 1) // world
    part = allocate_features(stop - start, stored.features.shape[1], dtype)
    for first, rows in stored.blocks(start, stop):
        rows = normalize_rows(rows.float()) if normalized else rows
        part.features[first - start : first - start + len(rows)] = rows.to(dtype)
    part.labels.copy_(torch.from_numpy(stored.labels[start:stop]))
    part.indices.copy_(torch.from_numpy(stored.images[start:stop]))
    return part


class _Place(NamedTuple):
    """The folder that holds the features of one split, or is to hold them."""

    folder: Path
    holds_them: bool
    note: str = ""
    problem: str = ""


def _find(root: Path, split: str, asked: Mapping[str, Any]) -> _Place:
    """The folder to read from or to write to.

    experiments/extract_features.py writes `root`/`split`. Probes write beside it, to one folder per
    transform, because otherwise two probes that resize differently would keep replacing each
    other's features.
    """
    slug = re.sub(r"[^a-z0-9]+", "_", asked["transform"].lower()).strip("_")
    if len(slug) > 60:
        slug = f"{slug[:50]}_{hashlib.sha256(slug.encode()).hexdigest()[:8]}"
    own = root / f"{split}_{slug}"
    note = ""
    for folder in (root / split, own):
        if not is_features(folder):
            continue
        try:
            wrong = differences(open_features(folder).meta, asked)
        except UserError as error:
            wrong = [str(error)]
        if not wrong:
            return _Place(folder, True, f"{split} features: read from {folder}")
        note = f"{folder} holds other features, so they are extracted again: {'; '.join(wrong)}"
    if own.exists() and not is_features(own) and any(own.iterdir()):
        return _Place(own, False, problem=f"{own} is no folder of features: not overwritten")
    return _Place(own, False, note)


def _data_fingerprint(dataset: ImageDataset) -> str:
    """A hash of all paths and labels, and of files' sizes and times, which tell a changed image."""
    digest = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        for start in range(0, len(dataset), 100 * ASKED_AT_ONCE):
            indices = range(start, min(start + 100 * ASKED_AT_ONCE, len(dataset)))
            paths = [dataset.path(index) for index in indices]
            for index, path, state in zip(indices, paths, pool.map(_state, paths), strict=True):
                line = f"{path}\0{dataset.label(index)}\0{state}\n"
                digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _state(path: str) -> str:
    """Size and time of a file; "" for an image that has no file of its own."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ""
    return f"{found.st_size} {int(found.st_mtime)}"  # copies on other disks keep whole seconds


def _without_addresses(text: str) -> str:
    return _ADDRESS.sub("", " ".join(text.split()))
