"""Compare token reductions on plain and octic nets (experiments/compare_reduction.py)."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evaluation.comparison.nets import (
    image_size,
    load_run,
    read_images,
    speeds_of,
    train_then,
    trainings_of,
    unfinished,
)
from evaluation.comparison.reduction_dense import DenseHead, fit_dense_head, mean_iou
from evaluation.comparison.reduction_pictures import draw_reductions
from evaluation.comparison.tables import write_tables
from evaluation.cost.counting import check_counted
from evaluation.data import make_data
from evaluation.features.dataset import device_of
from evaluation.progress import say, track
from utils.config.build import build
from utils.errors import UserError, as_user_error
from utils.flops import count_operations
from utils.ranges import check_count, check_range

NONE = "unreduced"
COLUMNS = {
    "accuracy": "accuracy %",
    "miou": "mIoU %",
    "multiply_adds": "multiply-adds",
    "share": "of the net's own",
    "tokens": "tokens at the end",
    "images_per_second": "images/s",
}


class Entry(NamedTuple):
    """One net of the table: its trained model, the reduction method, and its strength."""

    model: str
    method: str
    strength: str  # an option and its value
    net: nn.Module

    @property
    def name(self) -> str:
        """Its row in the table."""
        return (
            self.model if self.method == NONE else f"{self.model} + {self.method} {self.strength}"
        )


class Images(NamedTuple):
    """Normalised images [N 3 H H] and their classes [N]."""

    images: Tensor
    labels: Tensor


def compare(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Train or load every model of `config["runs"]`, reduce it by every method, evaluate all.

    Reads the keys of configs/reduction_comparison.yaml, and `runs`, which its command line adds.
    Trainings resume, so repeating the command continues an interrupted one. Writes results.json,
    results.csv and a picture to `output_dir`; every rank must call this.
    """
    return train_then(_judge, config, _check)


def _judge(config: dict[str, Any], device: torch.device) -> dict[str, dict[str, Any]]:
    runs = config["runs"]
    size, data = image_size(runs), trainings_of(runs)[0]["data"]
    dataset = make_data(data, "val")
    nets = {name: load_run(run, dataset, size).to(device).eval() for name, run in runs.items()}
    entries, refused = make_entries(nets, config)
    for reason in refused:
        say(reason)
    dense = config["segmentation"]
    val = Images(*read_images(dataset, size))
    heads: dict[str, DenseHead] = {}
    if dense["train_images"]:
        known = read_images(make_data(data, "train"), size, dense["train_images"])
        heads = {
            name: fit_dense_head(net, *known, settings=dense, batch_size=config["batch_size"])
            for name, net in nets.items()
        }
    figures: dict[str, dict[str, Any]] = {}
    for entry in track(entries, total=len(entries), label="nets"):
        figures[entry.name] = _figures(entry, val, heads, config)
    for row in figures.values():
        own = next(f for f in figures.values() if f["model"] == row["model"])
        row["share"] = 100 * row["multiply_adds"] / own["multiply_adds"]
    batch = val.images[: config["speed_batch"]]
    everyone = {entry.name: entry.net for entry in entries}
    for name, speed in speeds_of(everyone, batch, config["speed_steps"]).items():
        figures[name]["images_per_second"] = speed
    _report(config, figures, device)
    if config["pictures"]:
        say(f"picture: {draw_reductions(figures, Path(config['output_dir']) / 'reductions.png')}")
    return figures


def _check(config: Mapping[str, Any]) -> None:
    """UserError, before anything is trained, for methods that fit no model or not the images."""
    check_settings(config)
    runs = config["runs"]
    size, dataset = image_size(runs), make_data(trainings_of(runs)[0]["data"], "val")
    entries, _ = make_entries(dict(unfinished(runs, dataset, size)), config)
    check_strengths(entries, size)


def check_settings(config: Mapping[str, Any]) -> None:
    """UserError for a value with which the table would hold figures of nothing."""
    check_count("speed_batch", config["speed_batch"], 1)
    dense = config["segmentation"]
    check_count("segmentation.train_images", dense["train_images"])
    check_count("segmentation.max_iter", dense["max_iter"], 1)
    check_range("segmentation.C", dense["C"], ends="(]")
    # No pixel is brighter than 1: everything would be background.
    check_range("segmentation.threshold", dense["threshold"], 0, 1, ends="[)")


@torch.inference_mode()
def check_strengths(entries: Iterable[Entry], size: int) -> None:
    """UserError, with the row's name, for a strength that images of `size` pixels do not allow."""
    blank = torch.zeros(1, 3, size, size)
    for entry in entries:
        with as_user_error(f"{entry.name}, images of {size} pixels: "):
            entry.net.eval()(blank)


def make_entries(
    nets: Mapping[str, nn.Module], config: Mapping[str, Any]
) -> tuple[list[Entry], list[str]]:
    """Every net, unreduced and under every method and strength; and the refusals with reasons.

    Reduced nets share the weights of the unreduced one. A net may refuse a method that others
    accept, as a hybrid cannot be reduced in its octic half; UserError if all nets refuse a method.
    """
    if not isinstance(config["wrapper"], Mapping):
        raise UserError(f"wrapper must be {{_target_: ...}}, not {config['wrapper']!r}")
    entries: list[Entry] = []
    refused: list[str] = []
    methods = config["methods"]
    for model, net in nets.items():
        entries.append(Entry(model, NONE, "", net))
        for label, entry in methods.items():
            for value in entry["values"]:
                options = {**(entry.get("options") or {}), entry["over"]: value}
                node = {**config["wrapper"], "method": entry["method"], "options": options}
                if entry.get("form"):
                    node["form"] = entry["form"]
                strength = f"{entry.get('short', entry['over'])}={_short(value)}"
                try:
                    wrapped = build(node, backbone=net).eval()
                except UserError as error:
                    refused.append(f"{model} + {label} {strength}: {error}")
                    continue
                entries.append(Entry(model, label, strength, wrapped))
    taken = {entry.method for entry in entries}
    for label in methods:
        if label not in taken:
            reason = next(line for line in refused if f" + {label} " in line)
            raise UserError(f"methods.{label} fits none of the models; {reason}")
    return entries, refused


@torch.inference_mode()
def _figures(
    entry: Entry, val: Images, heads: Mapping[str, DenseHead], config: Mapping[str, Any]
) -> dict[str, Any]:
    net, device, batch = entry.net, device_of(entry.net), config["batch_size"]
    logits = torch.cat([net(part.to(device)).cpu() for part in val.images.split(batch)])
    right = logits.argmax(dim=1) == val.labels
    first = val.images[:1].to(device)
    operations = count_operations(net, first, backward=False)
    check_counted(entry.name, operations)
    found: dict[str, Any] = {
        "model": entry.model,
        "method": entry.method,
        "strength": entry.strength,
        "accuracy": 100 * float(right.double().mean()),
        "multiply_adds": operations.forward // 2,
    }
    if hasattr(net, "inspect"):
        found["tokens"] = int(net.inspect(first).tokens.shape[1])
    if entry.model in heads:
        found["miou"] = mean_iou(
            net, heads[entry.model], *val, config["segmentation"]["threshold"], batch
        )
    return found


def _report(
    config: Mapping[str, Any], figures: Mapping[str, dict[str, Any]], device: torch.device
) -> None:
    write_tables(
        "reduction",
        "reduced nets: accuracy, segmentation, cost",
        figures,
        config,
        device,
        columns=COLUMNS,
        csv_columns=("model", "method", "strength", *COLUMNS),
        settings=("methods", "segmentation", "speed_batch"),
        how="nothing is trained after the reduction; data.val; mIoU: of background and classes, a "
        f"linear head of the unreduced net's patches ({config['segmentation']['train_images']} "
        "images) on the patches handed back; multiply-adds of the first image, products alone; "
        f"images/s: batch {config['speed_batch']}, nets in turn,",
    )


def _short(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)
