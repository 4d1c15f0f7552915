"""Check whether a published checkpoint gives its published figures (experiments/reproduce.py)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from evaluation.classifier import judge_classifier
from evaluation.data import make_data
from evaluation.features.dataset import PRECISIONS
from evaluation.judge import judge
from evaluation.nets import build_net
from evaluation.progress import say
from evaluation.published import DINOV2, IMAGENET_VAL, PUBLISHED, Published
from evaluation.results import print_table
from utils import distributed
from utils.config.build import plain
from utils.config.files import backbone_node
from utils.errors import UserError, as_user_error, one_line
from utils.joining import session
from utils.nearest import nearest
from utils.results_file import write_results
from vit.weights import load_state, read_state

JUDGED_IN = ("auto", *PRECISIONS)  # auto: as `settled` says


def reproduce(config: Mapping[str, Any]) -> bool:
    """Evaluate the file by the published protocol and compare the figures with the stated ones.

    A probe whose precision is "auto" runs in the published one, on a CPU in fp32. Returns whether
    all measured figures agree. UserError as `check_images`. Every rank must call this.
    """
    config = dict(plain(config))
    published = PUBLISHED[config["published"]]
    with session(config["device"]) as device:
        check_images(config["data"])
        config["probes"] = settled(config["probes"], published, device.type)
        figures = (judge if published.recipe == DINOV2 else judge_classifier)(config)
        figures |= best_of_knn(figures)
        agrees = report(config, published, figures)
        distributed.barrier()
    return agrees


def check_images(data: Mapping[str, Any]) -> None:
    """UserError if data.val is not ImageNet's validation set, by its number of images."""
    count = len(make_data(data, "val"))
    if count != IMAGENET_VAL:
        raise UserError(
            f"the figures were stated on ImageNet's {IMAGENET_VAL:,} validation images, and "
            f"data.val holds {count:,}; give --data-path IMAGENET"
        )


def settled(
    probes: Mapping[str, Any], published: Published, device: str
) -> dict[str, dict[str, Any]]:
    """The probes that run, with the published precision where theirs is "auto", on a CPU fp32."""
    probes = {name: dict(node) for name, node in probes.items() if node}
    changed = {}
    for name, node in probes.items():
        if node.get("precision") == "auto":
            stated = published.precision(name)
            node["precision"] = "fp32" if device == "cpu" else stated
            if node["precision"] != stated:
                changed[name] = stated
    if changed and distributed.is_main():
        theirs = ", ".join(f"{name} {stated}" for name, stated in changed.items())
        say(f"on a CPU in fp32; the figures were measured on a GPU under autocast: {theirs}")
    return probes


def report(config: Mapping[str, Any], published: Published, figures: Mapping[str, float]) -> bool:
    """Print and write our figures beside the published ones; returns whether all measured agree."""
    rows, verdicts = [], []
    for key, stated in published.figures.items():
        ours = figures.get(key)
        verdict = "not measured"
        if ours is not None:
            verdicts.append(stated.agrees(ours))
            verdict = "reproduces" if verdicts[-1] else "does NOT reproduce"
        difference = None if ours is None else f"{ours - stated.value:+.3f}"
        shown = None if ours is None else f"{ours:.3f}"
        rows.append((key, f"{stated.value:g}", shown, difference, f"{stated.tolerance:g}", verdict))
    name = config["published"]
    precisions = {probe: node.get("precision") for probe, node in config["probes"].items()}
    if distributed.is_main():
        print_table(
            f"{name}, {config['weights']}",
            ("figure", "published", "ours", "difference", "allowed", "verdict"),
            rows,
            protocol=f"{published.source}, {published.config}; precision of the net: "
            f"{', '.join(f'{probe} {word}' for probe, word in precisions.items() if word)}; which "
            "k the kNN figure has is not stated: the best of those asked",
        )
        judged = {"weights": config["weights"], "model": name, "config": published.config}
        judged["precision"] = precisions
        both = {
            "published": {key: stated.value for key, stated in published.figures.items()},
            "ours": {key: figures.get(key) for key in published.figures},
        }
        path = write_results(config["output_dir"], "reproduction", protocol=judged, figures=both)
        say(f"written: {path}")
    return bool(verdicts) and all(verdicts)


def best_of_knn(figures: Mapping[str, float]) -> dict[str, float]:
    """`knn/best_top1`: the best full kNN accuracy over k."""
    full = [
        value
        for key, value in figures.items()
        if key.startswith("knn/knn") and key.endswith("_top1") and "per_class" not in key
    ]
    return {"knn/best_top1": max(full)} if full else {}


def model_of(path: str, name: str | None) -> str:
    """The published model that a file belongs to; UserError if there is none, or not `name`."""
    if name is not None and name not in PUBLISHED:
        raise UserError(f"no published checkpoint {name!r}{nearest(name, PUBLISHED)}")
    with as_user_error():
        state = read_state(path)
    complaints = {}
    for candidate in PUBLISHED if name is None else [name]:
        try:
            check_layout(candidate, state)
            return candidate
        except ValueError as error:
            complaints[candidate] = one_line(error)
    if name is not None:
        raise UserError(f"{path}: {complaints[name]}")
    known = ", ".join(PUBLISHED)
    raise UserError(f"{path} has the layout of no published checkpoint ({known}); --model says why")


def check_layout(name: str, state: Mapping[str, Tensor]) -> None:
    """ValueError unless a file's names and shapes are those of a published model."""
    with torch.device("meta"):
        net = build_net(backbone_node(name))
    load_state(net, {key: tensor.to("meta") for key, tensor in state.items()})
