"""Write features of images as one array to disk; experiments/extract_features.py runs this."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.data import make_data
from evaluation.features.cache import CLASS_TOKEN, identity, store_features, transform_in_words
from evaluation.features.dataset import PRECISIONS, normalize_rows
from evaluation.features.files import (
    DTYPES,
    FEATURES,
    INDEX,
    META,
    StoredFeatures,
    differences,
    is_features,
    open_features,
)
from evaluation.features.reading import features_of
from evaluation.image_size import settle_sizes
from evaluation.nets import chosen_backbone, make_net, warn_if_random, weights_of
from evaluation.progress import say
from utils import distributed
from utils.config.build import build, plain
from utils.data.images import ImageDataset
from utils.data.transforms import evaluation_transform
from utils.errors import UserError
from utils.joining import session
from utils.ranges import check_count, check_word
from vit.backbone import Backbone

FOLDER = "utils.data.images.folder"
KINDS = {
    "cls": "class token",
    "cls_patchmean": "class token and mean of the patch tokens, side by side",
    "patches": "map of patch tokens",
}


class FeatureReader:
    """Computes one kind of feature of some blocks, earliest first, for a batch of images.

    Rows are [B, D] for cls, [B, 2 D] for cls_patchmean and [B, h, w, D] for patches; several blocks
    are concatenated in the last dimension.
    """

    def __init__(self, *, kind: str, layers: Sequence[int], normalized: bool) -> None:
        check_word("feature", kind, KINDS)
        if not layers:
            raise UserError("layers names no block; [-1] is the last")
        for layer in layers:
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise UserError(f"layers: a block is a whole number, such as -1, not {layer!r}")
        self.kind, self.layers, self.normalized = kind, tuple(layers), normalized

    def __call__(self, net: Backbone, images: Tensor) -> Tensor:
        """Features of a batch."""
        parts = []
        for cls, patches in features_of(net, images, self.layers):
            if self.kind != "patches":
                parts.append(cls.float())
            if self.kind == "cls":
                continue
            if patches is None:
                raise UserError(
                    f"feature={self.kind}: the net drops tokens, so it has no patch tokens"
                )
            pooled = self.kind == "cls_patchmean"
            parts.append(patches.float().mean(dim=(1, 2)) if pooled else patches.float())
        if len(maps := {part.shape[:-1] for part in parts}) > 1:
            found = ", ".join(" x ".join(map(str, shape[1:])) for shape in sorted(maps))
            raise UserError(
                f"feature={self.kind}: maps of {found} patches do not fit side by side; "
                f"give one of layers={list(self.layers)}, or feature=cls_patchmean"
            )
        rows = torch.cat(parts, dim=-1)
        return normalize_rows(rows) if self.normalized else rows

    @property
    def words(self) -> str:
        """Describes the rows; the default's words equal the probes', so that they can reuse it."""
        if self.layers == (-1,) and self.kind == "cls":
            return CLASS_TOKEN
        blocks = ", ".join(str(layer) for layer in self.layers)
        return f"{KINDS[self.kind]} of blocks {blocks} after the final norm"


def extract(config: Mapping[str, Any]) -> str:
    """Write the features of one split to `output_dir`/`split`; returns that folder.

    Reads the keys of configs/extract.yaml. UserError if the folder already holds features, with
    their differences from these, unless `overwrite` is true; and if it holds anything else.
    """
    config = dict(plain(config))
    _check(config)
    folder = Path(config["output_dir"]) / config["split"]
    reader = FeatureReader(
        kind=config["feature"], layers=config["layers"], normalized=config["normalized"]
    )
    with session(config["device"]) as device:
        config["backbone"] = chosen_backbone(config)
        dataset = _images(config["data"], config["split"])
        net = make_net(config["backbone"], config["weights"], seed=config["seed"])
        _check_layers(net, config["layers"])
        backbone, weights = config["backbone"], config["weights"]
        warn_if_random(backbone, weights, flag="--weights", doing="features of")
        if distributed.is_main():
            say(f"images: {dataset!r}")
        resize_size, crop_size = settle_sizes(net, config["resize_size"], config["crop_size"])
        asked = identity(
            net.to(device),
            dataset,
            transform=transform_in_words(None, resize_size, crop_size),
            feature=reader.words,
            precision=config["precision"],
            normalized=config["normalized"],
            dtype=config["dtype"],
            on_error=config["on_error"],
        )
        refusal = distributed.broadcast_object(
            _refusal(folder, asked, config["overwrite"]) if distributed.is_main() else None
        )
        if refusal:
            raise UserError(refusal)
        store_features(
            net,
            dataset,
            folder,
            asked | {"weights": weights_of(backbone, weights)},
            transform=evaluation_transform(resize_size=resize_size, crop_size=crop_size),
            batch_size=config["batch_size"],
            num_workers=config["num_workers"],
            precision=config["precision"],
            read=reader,
            on_error=config["on_error"],
        )
        if distributed.is_main():
            _report(open_features(folder))
        distributed.barrier()
    return str(folder)


def _check(config: Mapping[str, Any]) -> None:
    for key, known in {
        "split": ("all", "train", "val"),
        "dtype": tuple(DTYPES),
        "precision": tuple(PRECISIONS),
        "on_error": ("raise", "skip"),
    }.items():
        check_word(key, config[key], known)
    for key, least in {"batch_size": 1, "num_workers": 0, "resize_size": 1, "crop_size": 1}.items():
        own = config[key] is None and key in ("resize_size", "crop_size")
        if not own:
            check_count(key, config[key], least)


def _check_layers(net: nn.Module, layers: Sequence[int]) -> None:
    depth = getattr(net, "depth", None)
    if not isinstance(depth, int):
        return
    for layer in layers:
        if not -depth <= layer < depth:
            raise UserError(f"layers: there is no block {layer}; the net has {depth}")


def _images(node: Mapping[str, Any], split: str) -> ImageDataset:
    """The images of a split of a data node; `all` is a whole folder in its own order."""
    if split != "all":
        return make_data(node, split)
    train = node.get("train") or {}
    if train.get("_target_") != FOLDER:
        raise UserError("split=all is for data=folder; choose split=train or split=val")
    return build(
        {
            "_target_": "utils.data.images.ImageFolder",
            "root": train.get("root"),
            "labels": train.get("labels", True),
        }
    )


def _refusal(folder: Path, asked: Mapping[str, Any], overwrite: bool) -> str:
    """Why nothing may be written to the folder; "" if it may."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return ""
    if not is_features(folder):
        return f"{folder} is there and holds no features; give another OUTPUT"
    if overwrite:
        return ""
    try:
        wrong = differences(open_features(folder).meta, asked)
    except UserError as error:
        wrong = [str(error)]
    what = f"it holds other features ({'; '.join(wrong)})" if wrong else "it holds these features"
    return f"{folder} is there: {what}; --overwrite replaces them"


def _report(stored: StoredFeatures) -> None:
    folder, meta = stored.folder, stored.meta
    size = stored.features.nbytes / 1e6
    shape = " x ".join(str(length) for length in stored.features.shape)
    say(f"features: {folder / FEATURES}, {shape} {stored.features.dtype}, {size:,.1f} MB")
    say(f"each row: {meta['feature']}{', L2-normalised' if meta['normalized'] else ''}")
    say(f"images: {meta['transform']}")
    skipped = f"; {meta['skipped']} could not be read, they have no row" if meta["skipped"] else ""
    unlabelled = int(np.count_nonzero(stored.labels < 0))
    without = f", {unlabelled} of them without a label" if unlabelled else ""
    say(f"index: {folder / INDEX}, {len(stored.labels):,} images{without}{skipped}")
    say(f"what they are of: {folder / META}")
    say("to open it:")
    say("    import numpy as np")
    say(f"    features = np.load({str(folder / FEATURES)!r}, mmap_mode='r')")
