"""Train or load the nets of a comparison, all for one data set and images of one size."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.cost.timing import INFERENCE, Contestant, measure_in_turn, speed_of
from evaluation.features.dataset import device_of
from evaluation.image_size import image_size_of
from evaluation.nets import make_net, weights_file
from evaluation.progress import say
from evaluation.sample import spread
from utils import distributed
from utils.config.build import plain
from utils.config.check import networks
from utils.config.settings import check_settings
from utils.config.trainings import in_folders
from utils.data.classes import mismatch
from utils.data.images import ImageDataset
from utils.data.transforms import evaluation_transform
from utils.errors import UserError
from utils.folders import check_folder
from utils.joining import session
from utils.ranges import check_count
from utils.run import train
from utils.run_files import CONFIG
from utils.run_folder import changed_keys, saved_config
from vit.weights import read_metadata

ROUNDS = 3  # of turns in which speeds are measured


def train_then(
    judge: Callable[[dict[str, Any], torch.device], dict[str, Any]],
    config: Mapping[str, Any],
    check: Callable[[dict[str, Any]], object],
) -> dict[str, Any]:
    """Train the runs of `config["runs"]` on all ranks, then call `judge` on rank 0; others wait.

    check: called before any training, to find mistakes in the settings of the evaluation.
    """
    config = in_folders(plain(config))
    figures: dict[str, Any] = {}
    check_folder(config["output_dir"])
    check_count("batch_size", config["batch_size"], 1)
    check_count("speed_steps", config["speed_steps"])
    for name, run in config["runs"].items():
        if isinstance(run, dict):
            _check_training(name, run)
    with session(config["device"]) as device:
        check(config)
        for name, run in config["runs"].items():
            if isinstance(run, dict):
                if distributed.is_main():
                    say(f"--- training: {name}, in {run['output_dir']}")
                train(run)
                distributed.on_main(partial(_check_recipe, name, run))
        if distributed.is_main():
            figures = judge(config, device)
        distributed.barrier()
    return figures


def trainings_of(runs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The configs of the runs to train; without any, those saved in the run folders to load.

    The data of the first one is used to evaluate all nets. UserError for a folder of a training
    that has no data or no size of its images.
    """
    trained = [run for run in runs.values() if isinstance(run, dict)]
    folders = [Path(str(run)).expanduser() for run in runs.values()]
    return trained or [_finished(path) for path in folders if (path / CONFIG).is_file()]


def image_size(runs: Mapping[str, Any]) -> int:
    """Side in pixels of the images of `trainings_of`; UserError if it differs between them."""
    sizes = {_augmented_size(run["recipe"]["augmentation"]) for run in trainings_of(runs)}
    if len(sizes) > 1:
        raise UserError(f"models on images of {sorted(sizes)} pixels do not compare: give one size")
    return sizes.pop()


def load_run(run: Any, dataset: ImageDataset, size: int) -> nn.Module:
    """Load the net of a finished training, or of a run folder or file exported by us.

    UserError if its classes are not those of the data set, or its image size is not `size`.
    """
    if isinstance(run, dict):
        return make_net(run["backbone"], run["output_dir"], seed=run["seed"])
    path = Path(weights_file(str(run)) or "")
    metadata = read_metadata(path) if path.is_file() else {}
    if "constructor" not in metadata:
        raise UserError(f"{path} is no file of ours that says which net it is of")
    wrong = mismatch(metadata, dataset)
    if wrong:
        raise UserError(f"{path}: {wrong}; figures would mean nothing")
    net = make_net(json.loads(metadata["constructor"]), str(path))
    if image_size_of(net) != size:
        raise UserError(
            f"{path} is of a net for images of {image_size_of(net)} pixels; the others have {size}"
        )
    return net


def unfinished(
    runs: Mapping[str, Any], dataset: ImageDataset, size: int
) -> Iterator[tuple[str, nn.Module]]:
    """Yield every model by name before any training: those to train are built, others loaded."""
    for name, run in runs.items():
        if isinstance(run, dict):
            yield name, make_net(run["backbone"], None, seed=run["seed"])
        else:
            yield name, load_run(run, dataset, size)


def read_images(
    dataset: ImageDataset, size: int, count: int | None = None
) -> tuple[Tensor, Tensor]:
    """Images [N 3 H H] under the evaluation transform, and labels [N].

    count: only so many, spread evenly over the data set.
    """
    transform = evaluation_transform(resize_size=size, crop_size=size)
    chosen = spread(len(dataset), count or len(dataset))
    images = torch.stack([transform(dataset.read(index)) for index in chosen])
    return images, torch.tensor([dataset.label(index) for index in chosen])


def speeds_of(nets: Mapping[str, nn.Module], images: Tensor, steps: int) -> dict[str, float]:
    """Images per second of every net on a batch, measured in turn; empty for 0 steps."""
    if not steps:
        return {}
    batch = images.to(device_of(next(iter(nets.values()))))
    contestants = {name: Contestant(net, batch) for name, net in nets.items()}
    turns, _ = measure_in_turn(
        contestants, INFERENCE, steps=max(steps, ROUNDS), rounds=ROUNDS, warmup=0
    )
    return {name: speed_of(own, len(batch)).images_per_second for name, own in turns.items()}


def _check_training(name: str, run: Mapping[str, Any]) -> None:
    """UserError now for what a training would refuse only after those before it are done."""
    try:
        check_settings(run)
        networks(dict(run))
    except UserError as error:
        raise UserError(f"{name}: {error} (words=... and --epochs hold for all)") from None


def _check_recipe(name: str, run: Mapping[str, Any]) -> None:
    """UserError for a net that an earlier command finished by another recipe than `run`.

    It is not trained again, so the table would name a recipe that is not its own.
    """
    folder = Path(run["output_dir"])
    changes = changed_keys(saved_config(folder / CONFIG), run)
    if changes:
        raise UserError(
            f"{folder} was finished by another recipe ({', '.join(changes)}); choose another "
            f"output_dir, or load it as it is: models.{name}={folder}"
        )


def _finished(folder: Path) -> dict[str, Any]:
    config = saved_config(folder / CONFIG)
    if not config.get("data") or not (config.get("recipe") or {}).get("augmentation"):
        raise UserError(f"{folder / CONFIG} is of no classifier's training: it gives no image size")
    return config


def _augmented_size(augmentation: Mapping[str, Any]) -> int:
    """The image size of an augmentation, or of the one it wraps."""
    return augmentation.get("input_size") or _augmented_size(augmentation["augmentation"])
