"""Judge one net by the probes of a config: what experiments/eval_dinov2_classification.py runs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evaluation.progress import say
from evaluation.results import in_words, print_table, write_results
from utils import distributed
from utils.build import build, plain
from utils.data.images import ImageDataset
from utils.errors import UserError
from vit.weights import load_weights


def judge(config: Mapping[str, Any]) -> dict[str, float]:
    """Build net and data, load the weights strictly, run every probe into `output_dir`/<probe>.

    Reads the keys of configs/evaluate.yaml. Returns figures as `probe/name`; every rank gets them.
    """
    config = plain(config)
    folder = Path(config["output_dir"])
    with distributed.session(config["device"]) as device:
        probes = {name: build(node) for name, node in config["probes"].items() if node}
        net = make_net(config["backbone"], config["weights"], seed=config["seed"]).to(device)
        data = {split: make_data(config["data"], split) for split in ("train", "val")}
        if distributed.is_main():
            _say_what_is_judged(config, data)
        results = {name: probe(net, data, folder / name, 0) for name, probe in probes.items()}
        if distributed.is_main():
            for name, figures in results.items():
                _report(config, folder, name, figures, probes[name])
        distributed.barrier()
    return {f"{name}/{key}": value for name, part in results.items() for key, value in part.items()}


def make_net(backbone: Mapping[str, Any], weights: str | None, *, seed: int = 0) -> nn.Module:
    """The net a backbone node describes, in eval mode; weights must fit to the last key."""
    torch.manual_seed(seed)
    net = build({**backbone, "_partial_": True})()
    if not hasattr(net, "features"):
        raise UserError(
            f"{backbone['_target_']} is no Backbone: it has no features(); use backbone=timm"
        )
    if weights:
        try:
            # An adapter's own name for the net it wraps is in nobody's file.
            load_weights(getattr(net, "net", net), weights)
        except ValueError as error:
            raise UserError(" ".join(str(error).split())) from None
    return net.eval()


def make_data(node: Mapping[str, Any], split: str) -> ImageDataset:
    """The data set of one split of a `data` node."""
    if not node.get(split):
        raise UserError(f"data.{split} is missing: a probe needs training and validation images")
    return build(node[split])


def _say_what_is_judged(config: Mapping[str, Any], data: Mapping[str, ImageDataset]) -> None:
    backbone = config["backbone"]
    if not config["weights"] and not backbone.get("pretrained", False):
        say("no weights given (--pretrained-weights FILE): judging the random initialisation")
    for split, dataset in data.items():
        say(f"{split}: {dataset!r}")


def _report(
    config: Mapping[str, Any],
    folder: Path,
    name: str,
    figures: Mapping[str, float],
    probe: Callable,
) -> None:
    backbone = config["backbone"].get("model_name") or config["backbone"]["_target_"].split(".")[-1]
    judged = {"backbone": backbone, "weights": config["weights"], "seed": config["seed"]}
    protocol = dict(getattr(probe, "protocol", {}))
    path = write_results(folder, name, protocol=judged | protocol, figures=figures)
    rows = [
        (key.removesuffix("_top1"), value, figures.get(f"{key.removesuffix('_top1')}_top5"))
        for key, value in figures.items()
        if key.endswith("_top1")
    ]
    print_table(
        f"{backbone}, weights: {config['weights']}",
        (name, "top-1 %", "top-5 %"),
        rows,
        protocol=in_words(protocol),
    )
    say(f"written: {path}, {folder / name}")
