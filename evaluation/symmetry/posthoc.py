"""Make a trained classifier invariant by each aggregator and evaluate it (experiments/posthoc.py).

The wrapper and its training are objects of the config.
"""

import csv
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torchvision.transforms import v2

from evaluation.data import make_data
from evaluation.features.dataset import device_of
from evaluation.image_size import image_size_of
from evaluation.nets import (
    complete,
    make_classifier,
    name_of,
    read_weights,
    warn_if_random,
    weights_in_words,
    weights_of,
)
from evaluation.probes.accuracy import UPRIGHT, check_labels
from evaluation.progress import say, track
from evaluation.results import print_table
from evaluation.wrapped import wrap_all
from utils import distributed
from utils.checkpoints.weights_file import export_weights
from utils.config.build import build, plain
from utils.data.classes import class_metadata
from utils.data.images import ImageDataset, Subset
from utils.data.loaders import evaluation_batches
from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD, evaluation_transform
from utils.errors import UserError
from utils.folders import check_folder, make_folder
from utils.joining import session
from utils.ranges import check_share
from utils.results_file import write_results
from utils.symmetry import SYMMETRIES, transform_image

ALONE = "backbone alone"
CSV_COLUMNS = ("Model", "Validation Accuracy", "Test Accuracy")


class Parts(NamedTuple):
    """The images to train on, to choose the epoch on, and to evaluate on."""

    train: ImageDataset
    validation: ImageDataset
    test: ImageDataset


def compare_aggregators(config: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Evaluate a classifier alone and under every aggregator of `config`, trained if asked for.

    Reads the keys of configs/posthoc.yaml. Writes results.csv, results.json and the trained nets to
    `output_dir`; of several processes only the first one works.
    """
    config = dict(plain(config))
    figures: dict[str, dict[str, float]] = {}
    check_folder(config["output_dir"])
    with session(config["device"]) as device:
        if distributed.is_main():
            figures = _compare(config, device)
        distributed.barrier()
    return figures


def _compare(config: dict[str, Any], device: torch.device) -> dict[str, dict[str, float]]:
    folder = Path(config["output_dir"])
    parts = split_data(config)
    node, classifier = load_classifier(config, parts.test)
    transform = make_transform(config, classifier)
    warn_if_random(node, config["weights"], flag="--weights", doing="judging")
    weights = weights_in_words(node, config["weights"])
    say(f"{name_of(node)}, weights: {weights}; test: {parts.test!r}")
    nets, fitted = make_wrapped(classifier.to(device), config, parts, transform)
    for name in fitted:
        whole = {**config["wrapper"], "aggregator": name, "backbone": {**node, "_partial_": True}}
        save(folder / f"{name}.safetensors", nets[name], whole, parts.train)
    shared = [] if config["trained"] == "all" else list(nets)
    options: dict[str, Any] = {
        "shared": shared,
        "transform": transform,
        "batch_size": config["batch_size"],
        "num_workers": config["num_workers"],
    }
    everyone = {ALONE: classifier, **nets}
    validation = judge_together(everyone, parts.validation, [UPRIGHT], **options)
    test = judge_together(everyone, parts.test, list(SYMMETRIES), **options)
    figures = {}
    for name in everyone:
        by_element = list(test[name].values())
        figures[name] = {
            "validation": validation[name][UPRIGHT],
            "test": by_element[0],
            "test_symmetries": sum(by_element) / len(by_element),
            "test_worst_symmetry": min(by_element),
            **({"best_epoch": fitted[name]} if name in fitted else {}),
        }
    report(config, folder, figures)
    return figures


def make_wrapped(
    classifier: nn.Module, config: Mapping[str, Any], parts: Parts, transform: Callable
) -> tuple[dict[str, Any], dict[str, int]]:
    """The classifier under every aggregator, trained if asked for; and the best epochs of these.

    With trained="none" all of them share one backbone.
    """
    training = build(config["training"])
    wrapped = wrap_all(classifier, config)
    fitted: dict[str, int] = {}
    embedded = None  # embeddings of the frozen backbone, the same for every aggregator
    for name, net in wrapped.items():
        net.to(device_of(classifier))
        if net.trained != "none":
            say(f"training {name}: {net.trained}")
            both = {"train": parts.train, "validation": parts.validation, "transform": transform}
            if net.trained != "all" and training.augmentation is None:
                embedded = embedded or training.embed_both(net, **both)
            done = training(net, **both, shown=say, embedded=embedded)
            fitted[name] = done.best_epoch
        net.eval()
    return wrapped, fitted


def split_data(config: Mapping[str, Any]) -> Parts:
    """Training, validation and test images; the same for the same seed.

    Validation images are those of `validation`, or by default a share of the training images; the
    published MNIST script takes them from the test set.
    """
    for share in ("validation_share", "data_share"):
        check_share(share, config[share])
    sets = [make_data(config["data"], split) for split in ("train", "val")]
    if config["validation"]:
        if not isinstance(config["validation"], Mapping):
            raise UserError(
                f"validation must be a data set, {{_target_: ...}}, or null, "
                f"not {config['validation']!r}"
            )
        sets.append(build(config["validation"]))
    for part in sets:
        check_labels(part)
    train, test, *apart = (_of_classes(part, config["classes"]) for part in sets)
    order = np.random.default_rng(config["seed"]).permutation(len(train))
    held = 0 if apart else round(config["validation_share"] * len(train))
    enough = bool(apart) or 0 < held < len(train)
    if not enough or not 0 < config["data_share"] <= 1:
        raise UserError(
            f"validation_share {config['validation_share']} and data_share {config['data_share']} "
            f"of {len(train)} training images leave nothing to validate or to train on"
        )
    used = max(1, round(config["data_share"] * (len(train) - held)))
    validation, rest = np.sort(order[:held]), np.sort(order[held : held + used])
    return Parts(Subset(train, rest), apart[0] if apart else Subset(train, validation), test)


def _of_classes(dataset: ImageDataset, classes: Sequence[int] | None) -> ImageDataset:
    """The images of these classes, with unchanged labels."""
    if classes is None or dataset.labels is None:
        return dataset
    missing = sorted(set(classes) - set(np.unique(dataset.labels).tolist()))
    if missing:
        raise UserError(
            f"classes={list(classes)}: {dataset!r} has no image of class "
            f"{', '.join(map(str, missing))}"
        )
    if len(set(classes)) < 2:
        raise UserError(f"classes={list(classes)} leaves one class, which every answer is right of")
    members = np.flatnonzero(np.isin(dataset.labels, list(classes)))
    return Subset(dataset, members)


def load_classifier(
    config: Mapping[str, Any], dataset: ImageDataset
) -> tuple[dict[str, Any], nn.Module]:
    """The classifier with its weights, loaded strictly, and the node that describes it."""
    path, metadata, state = read_weights(config["weights"], dataset)
    node = complete(config["backbone"], metadata, state, dataset)
    return node, make_classifier(node, state, path, seed=config["seed"])


def make_transform(config: Mapping[str, Any], net: Any) -> Callable:
    """The transform from an image to the net's input: size, channels and normalisation."""
    size = config["image_size"] or image_size_of(net)
    channels = int(getattr(net, "in_chans", 3))
    mean, std = (
        [value] * channels if isinstance(value, int | float) else value
        for value in (config["mean"] or IMAGENET_MEAN, config["std"] or IMAGENET_STD)
    )
    if channels == 1:
        mean, std = ([float(np.mean(values))] for values in (mean, std))
    usual = evaluation_transform(resize_size=size, crop_size=size, mean=mean, std=std)
    return v2.Compose([v2.Grayscale(1), usual]) if channels == 1 else usual


@torch.inference_mode()
def judge_together(
    nets: Mapping[str, Any],
    dataset: ImageDataset,
    elements: Sequence[str],
    *,
    shared: Collection[str],
    transform: Callable,
    batch_size: int,
    num_workers: int,
) -> dict[str, dict[str, float]]:
    """Accuracy in percent of every net under every symmetry: net -> element -> accuracy.

    shared: nets around one frozen backbone, which runs once for all of them.
    """
    hits = {name: dict.fromkeys(elements, 0) for name in nets}
    batches = evaluation_batches(dataset, transform, batch_size, num_workers=num_workers)
    batches = track(batches, total=len(dataset), label="images", size=lambda batch: len(batch[1]))
    for images, labels, _ in batches:
        for element in elements:
            device = device_of(next(iter(nets.values())))
            views = transform_image(images.to(device), element)
            for name, logits in answers(nets, views, shared).items():
                hits[name][element] += int((logits.argmax(dim=1).cpu() == labels).sum())
    return {
        name: {element: 100 * count / len(dataset) for element, count in by_element.items()}
        for name, by_element in hits.items()
    }


def answers(
    nets: Mapping[str, Any], images: torch.Tensor, shared: Collection[str]
) -> dict[str, torch.Tensor]:
    """Logits of every net; those in `shared` aggregate the same embeddings, each in its own way."""
    found, z = {}, None
    for name, net in nets.items():
        if name in shared:
            z = net.embeddings(images) if z is None else z
            found[name] = net.aggregate(z)
        else:
            found[name] = net(images)
    return found


def save(path: Path, net: nn.Module, node: Mapping[str, Any], dataset: ImageDataset) -> None:
    """Write a trained net with the node it was built from, as training runs do."""
    weights = {name: tensor.detach().cpu() for name, tensor in net.state_dict().items()}
    export_weights(path, weights, {"constructor": json.dumps(node), **class_metadata(dataset)})


def report(
    config: Mapping[str, Any], folder: Path, figures: Mapping[str, Mapping[str, float]]
) -> None:
    """Print one table; write it as results.json, and results.csv in the published columns."""
    make_folder(folder)
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for name, row in figures.items():
            writer.writerow([name, f"{row['validation']:.3f}", f"{row['test']:.3f}"])
    kept = ("backbone", "weights", "wrapper", "trained", "training", "data", "validation")
    shares = ("validation_share", "data_share", "classes", "seed")
    protocol = {key: config[key] for key in (*kept, *shares)}
    protocol["weights"] = weights_of(config["backbone"], config["weights"])
    held = f"{config['validation_share']:g} of the training images"
    path = write_results(folder, "posthoc", protocol=protocol, figures=figures)
    columns = ("validation", "test", "test_symmetries", "test_worst_symmetry")
    print_table(
        f"{name_of(config['backbone'])} made invariant to {config['wrapper']['group']}: accuracy %",
        ("", "validation", "test", "mean of 8 symmetries", "worst symmetry"),
        [(name, *(row[column] for column in columns)) for name, row in figures.items()],
        protocol=f"trained: {config['trained']}; learned aggregators always; the best epoch on "
        f"{'the validation set' if config['validation'] else held}; test: data.val",
    )
    say(f"written: {path}, {folder / 'results.csv'}")
