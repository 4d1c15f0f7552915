"""Evaluate one classifier; experiments/eval_deit.py runs this."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.judge import (
    as_built,
    brings_weights,
    chosen_backbone,
    load_strictly,
    make_data,
    name_of,
    other_model,
    splits_of,
    weights_file,
    weights_in_words,
)
from evaluation.progress import say
from evaluation.published import published_figure
from evaluation.results import write_results
from utils import distributed
from utils.config.build import build, plain
from utils.data.classes import class_list, mismatch
from utils.data.images import ImageDataset
from utils.errors import UserError
from vit.finetune import head_of
from vit.weights import read_metadata, read_state


def judge_classifier(config: Mapping[str, Any]) -> dict[str, float]:
    """Build net and data, load the weights strictly, run the probes into `output_dir`.

    Reads the keys of configs/eval/deit.yaml. A file exported by us names the keywords its net was
    built with and the classes it was trained on: UserError if the labels of data.val mean other
    classes. Returns figures as `probe/name`, on every rank.
    """
    config = plain(config)
    folder = Path(config["output_dir"])
    with distributed.session(config["device"]) as device:
        probes = {name: build(node) for name, node in config["probes"].items() if node}
        # The throughput probe alone needs no images.
        judged_on = "val" in splits_of(probes.values())
        dataset = make_data(config["data"], "val") if judged_on else None
        path, metadata, state = read_weights(config["weights"], dataset)
        backbone = complete(chosen_backbone(config), metadata, state, dataset)
        net = make_classifier(backbone, state, path, seed=config["seed"]).to(device)
        if distributed.is_main():
            _say_what_is_judged(backbone, path, dataset)
        data = {} if dataset is None else {"val": dataset}
        for probe in probes.values():
            if hasattr(probe, "check"):  # its requirements on the net, before anything is measured
                probe.check(net)
        judged = {"backbone": name_of(backbone), "weights": path, "data": repr(dataset)}
        results = {}
        for name, probe in probes.items():
            results[name] = figures = probe(net, data, folder, 0)
            if distributed.is_main():  # at once, so that an error in a later probe cannot lose it
                protocol = judged | dict(getattr(probe, "protocol", {}))
                say(f"written: {write_results(folder, name, protocol=protocol, figures=figures)}")
        if distributed.is_main() and dataset is not None:
            _say_published(backbone, metadata, path, dataset)
        distributed.barrier()
    return {f"{name}/{key}": value for name, part in results.items() for key, value in part.items()}


def read_weights(
    weights: str | None, dataset: ImageDataset | None
) -> tuple[str | None, dict[str, str], dict[str, Tensor] | None]:
    """Path, metadata and weights of a file or run folder; (None, {}, None) without one.

    UserError for a file that cannot be read, and if its classes are not those of the data set.
    """
    path = weights_file(weights)
    if not path:
        return path, {}, None
    try:
        metadata, state = read_metadata(path), read_state(path)
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None
    wrong = mismatch(metadata, dataset) if dataset is not None else None
    if wrong:
        raise UserError(f"{path}: {wrong}; figures would mean nothing")
    return path, metadata, state


def complete(
    backbone: Mapping[str, Any],
    metadata: Mapping[str, str],
    state: Mapping[str, Tensor] | None,
    dataset: ImageDataset | None,
) -> dict[str, Any]:
    """The backbone node, with keywords that it leaves open filled from the file.

    These are the constructor's keywords, if we exported the file, and the number of classes, which
    is else that of the data set. UserError if the file is of another model.
    """
    theirs = json.loads(metadata.get("constructor", "{}"))
    if wrong := other_model(backbone, theirs):
        raise UserError(wrong)
    if isinstance(backbone.get("backbone"), Mapping):
        # A net that wraps another one: the file is of the whole, or of the inner net alone.
        if theirs.get("_target_") == backbone["_target_"]:
            return as_built(backbone, theirs)
        inner = complete(backbone["backbone"], metadata, state, dataset)
        return {**backbone, "backbone": {**inner, "_partial_": True}}
    backbone = {**theirs, **backbone}
    if "num_classes" in backbone or backbone.get("pretrained"):
        return {"num_classes": 1000, **backbone}
    if brings_weights(backbone):  # which include the head
        return {"num_classes": None, **backbone} if ":" in name_of(backbone) else backbone
    count = None if state is None else count_classes(state)
    if count is None and dataset is not None:
        count = len(class_list(dataset))
    return backbone if count is None else {**backbone, "num_classes": count}


def count_classes(state: Mapping[str, Tensor]) -> int | None:
    """Number of classes of the head in a file, by the names of heads in our models and timm's.

    None if there is no head.
    """
    for head in ("head", "fc", "classifier", "head.fc", "head.l", "head.classifier", "heads.head"):
        for name, tensor in state.items():
            if name == f"{head}.weight" or name.endswith(f".{head}.weight"):
                return len(tensor)
    return None


def make_classifier(
    backbone: Mapping[str, Any], state: Mapping[str, Tensor] | None, path: str | None, *, seed: int
) -> nn.Module:
    """The net in eval mode; every key of the weights, in any published spelling, must match.

    UserError for a net without a classifier.
    """
    torch.manual_seed(seed)
    net = build({**backbone, "_partial_": True})()
    if state is not None:
        load_strictly(net, state, path)
    if f"{head_of(getattr(net, 'net', net))}.weight" not in getattr(net, "net", net).state_dict():
        raise UserError(f"{name_of(backbone)} has no classifier; probe its features instead")
    return net.eval()


def _say_what_is_judged(
    backbone: Mapping[str, Any], path: str | None, dataset: ImageDataset | None
) -> None:
    if not path and not brings_weights(backbone):
        say("no weights given (--eval FILE): judging the random initialisation")
    say(f"{name_of(backbone)}, weights: {weights_in_words(backbone, path)}")
    if dataset is not None:
        say(f"val: {dataset!r}")


def _say_published(
    backbone: Mapping[str, Any],
    metadata: Mapping[str, str],
    path: str | None,
    dataset: ImageDataset,
) -> None:
    published = published_figure(
        name_of(backbone),
        exported_by_us=path is None or "constructor" in metadata,
        num_images=len(dataset),
        num_classes=len(class_list(dataset)),
    )
    if published:
        say(str(published))
