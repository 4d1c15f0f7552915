"""Compare nets with and without symmetry under one recipe (experiments/compare_symmetry.py)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evaluation.comparison.nets import (
    image_size,
    load_run,
    read_images,
    speeds_of,
    train_then,
    trainings_of,
    unfinished,
)
from evaluation.comparison.symmetry_pictures import draw_comparison
from evaluation.comparison.symmetry_views import Judged, judge_views
from evaluation.comparison.tables import write_tables
from evaluation.data import make_data
from evaluation.progress import say
from evaluation.symmetry.angles import angles_of
from evaluation.symmetry.posthoc import make_wrapped, split_data
from evaluation.wrapped import wrap_all
from utils.config.build import build
from utils.data.transforms import evaluation_transform
from utils.flops import multiply_adds
from utils.ranges import check_count

SPEED_IMAGES = 16  # of a timed step
COLUMNS = {
    "upright": "upright",
    "mean_of_eight": "mean of 8",
    "worst_element": "worst of 8",
    "any_angle": "any angle (control)",
    "equivariance_error": "error",
    "parameters": "parameters",
    "multiply_adds": "multiply-adds",
    "images_per_second": "images/s",
}
Figures = dict[str, dict[str, float]]


class Field(NamedTuple):
    """The nets of a comparison, and the images they are evaluated on."""

    nets: dict[str, Any]
    shared: list[str]  # those around one backbone
    images: Tensor  # [N 3 H H] normalised
    labels: Tensor  # [N]
    class_names: list[str]


def compare(config: Mapping[str, Any]) -> Figures:
    """Train or load every model of `config["runs"]`, make one invariant post hoc, evaluate all.

    Reads the keys of configs/symmetry_comparison.yaml, and `runs`, which its command line adds.
    Trainings resume, so repeating the command continues an interrupted one. Writes results.json,
    results.csv and pictures to `output_dir`; every rank must call this.
    """
    return train_then(_judge, config, _check)


def _judge(config: dict[str, Any], device: torch.device) -> Figures:
    folder = Path(config["output_dir"])
    field = _make_field(config, device)
    groups = [field.shared, [name for name in field.nets if name not in field.shared]]
    judged: dict[str, Judged] = {}
    for group in groups:
        nets = {name: field.nets[name] for name in group}
        if nets:
            judged |= judge_views(
                nets,
                field.images,
                field.labels,
                angles_of(config["angle_step"]),
                shared=field.shared,
                batch_size=config["batch_size"],
            )
    judged = {name: judged[name] for name in field.nets}
    speeds = speeds_of(field.nets, field.images[:SPEED_IMAGES], config["speed_steps"])
    figures: Figures = {}
    for name, net in field.nets.items():
        figures[name] = judged[name].figures | {
            "parameters": sum(p.numel() for p in net.parameters()),
            "multiply_adds": multiply_adds(net, field.images.shape[-1]),
        }
        if name in speeds:
            figures[name]["images_per_second"] = speeds[name]
    _report(config, figures, judged, device)
    if config["pictures"]:
        digit = config["picture_digit"]
        for what, path in draw_comparison(
            field.nets, field.images[_first(field.labels, digit)], judged, folder, field.class_names
        ).items():
            say(f"picture: {what}: {path}")
    return figures


def _make_field(config: Mapping[str, Any], device: torch.device) -> Field:
    runs = config["runs"]
    size, dataset = image_size(runs), make_data(trainings_of(runs)[0]["data"], "val")
    images, labels = read_images(dataset, size)
    transform = evaluation_transform(resize_size=size, crop_size=size)
    nets = {name: load_run(run, dataset, size).to(device).eval() for name, run in runs.items()}
    shared: list[str] = []
    posthoc = config["posthoc"]
    for of in [name for name in nets if name in posthoc["of"]]:
        say(f"making {of} invariant post hoc")
        wanted = _posthoc(config)
        wrapped, _ = make_wrapped(nets[of], wanted, split_data(wanted), transform)
        named = {f"{of} + {aggregator}": net for aggregator, net in wrapped.items()}
        nets |= named
        shared += named if of == posthoc["of"][0] else ()
    return Field(nets, shared, images, labels, list(dataset.class_names))


def _posthoc(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of configs/posthoc.yaml that are needed to make and train the wrapped nets."""
    data = trainings_of(config["runs"])[0]["data"]
    return {**config["posthoc"], "data": data, "seed": config["seed"], "classes": None}


def _check(config: Mapping[str, Any]) -> None:
    """UserError, before any training, for settings that the evaluation would refuse."""
    angles_of(config["angle_step"])
    check_count("picture_digit", config["picture_digit"])
    runs, size = config["runs"], image_size(config["runs"])
    dataset, posthoc = make_data(trainings_of(runs)[0]["data"], "val"), config["posthoc"]
    for name, net in unfinished(runs, dataset, size):
        if name in posthoc["of"]:
            wanted = _posthoc(config)
            split_data(wanted)
            build(wanted["training"])
            wrap_all(net, wanted)


def _first(labels: Tensor, digit: int) -> int:
    found = (labels == digit).nonzero()
    return int(found[0]) if len(found) else 0


def _report(
    config: Mapping[str, Any],
    figures: Figures,
    judged: Mapping[str, Judged],
    device: torch.device,
) -> None:
    found = dict.fromkeys(["model", "upright", *next(iter(figures.values()))])
    angles = (
        f"any angle: every {config['angle_step']:g} degrees but quarter turns, bilinear, black "
        "comes in; control: turned there and back, interpolation alone; "
    )
    write_tables(
        "symmetry",
        "digits in all positions: accuracy %, error of invariance, cost",
        {name: row | judged[name]._asdict() for name, row in figures.items()},
        config,
        device,
        columns=COLUMNS,
        csv_columns=list(found),
        settings=("posthoc", "angle_step"),
        how="data.val; mean and worst of the square's eight symmetries; "
        f"{angles if 'any_angle' in found else ''}"
        "error: largest |f(g x) - f(x)| / |f(x)| of the logits over the eight;",
    )
