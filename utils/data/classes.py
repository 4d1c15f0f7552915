"""Record and compare the order of classes that a classifier was trained with."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from utils.data.images import ImageDataset, Subset

FINGERPRINT, NAMES = "class_fingerprint", "class_names"


def class_list(dataset: ImageDataset) -> list[str]:
    """What identifies each class, in label order: ImageNet's class ids, else the names."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return list(getattr(dataset, "class_ids", None) or dataset.class_names)


def class_fingerprint(classes: Sequence[str]) -> str:
    """A hash of the classes and of their order."""
    return hashlib.sha256(json.dumps(list(classes)).encode()).hexdigest()[:16]


def class_metadata(dataset: Any) -> dict[str, str]:
    """Names and fingerprint of the classes, as metadata of exported weights; {} without names."""
    classes = class_list(dataset) if getattr(dataset, "class_names", None) else []
    if not classes:
        return {}
    return {FINGERPRINT: class_fingerprint(classes), NAMES: json.dumps(classes)}


def mismatch(metadata: Mapping[str, str], dataset: ImageDataset) -> str | None:
    """An error line if the labels of `dataset` mean other classes than in training, else None.

    None also where the weights, or the data set, do not say their classes.
    """
    ours = class_list(dataset)
    if not ours or metadata.get(FINGERPRINT) in (None, class_fingerprint(ours)):
        return None
    theirs = json.loads(metadata.get(NAMES, "[]"))
    if len(theirs) != len(ours):
        return f"{len(theirs)} classes were trained, {len(ours)} in {dataset!r}"
    pairs = enumerate(zip(ours, theirs, strict=True))
    differ = [index for index, (here, there) in pairs if here != there]
    if not differ:
        return "the classes that the weights name have another fingerprint than the one beside them"
    first = differ[0]
    return (
        f"class {first} was {theirs[first]!r} in training and is {ours[first]!r} in {dataset!r} "
        f"({len(differ)} of {len(ours)} differ)"
    )
