"""The images that a net is judged on: the splits of a config's `data` node."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from utils.config.build import build
from utils.data.images import ImageDataset
from utils.errors import UserError


def make_data(node: Mapping[str, Any], split: str) -> ImageDataset:
    """The data set of one split of a `data` node; UserError if the node has none."""
    if not node.get(split):
        raise UserError(f"data.{split} is missing: a probe needs training and validation images")
    return build(node[split])


def data_for(probes: Iterable[Callable], node: Mapping[str, Any]) -> dict[str, ImageDataset]:
    """The splits of a `data` node that the probes read; a probe without `splits` reads both."""
    asked = {split for probe in probes for split in getattr(probe, "splits", ("train", "val"))}
    return {split: make_data(node, split) for split in sorted(asked)}
