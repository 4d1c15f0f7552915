"""Train a net and its plain twin in the same way, and compare them side by side."""

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from evaluation.data import make_data
from evaluation.nets import make_net
from evaluation.pictures.curves import draw_losses
from evaluation.pictures.neighbours import draw_neighbours
from evaluation.pictures.pca import draw_pca_maps
from evaluation.progress import say
from evaluation.report.page import write_report
from evaluation.results import in_words, print_table
from evaluation.sample import sample_images
from evaluation.symmetry.equivariance import layer_errors, worst_error
from utils import distributed
from utils.config.build import build, plain
from utils.config.trainings import in_folders
from utils.data.images import ImageDataset
from utils.data.transforms import evaluation_transform
from utils.flops import multiply_adds
from utils.folders import check_folder
from utils.joining import session
from utils.metrics_file import read_metrics
from utils.results_file import write_results
from utils.run import train
from utils.run_files import CURVES, METRICS, RESULTS

Figures = dict[str, float | None]
SHOWN = ("_top1", "_miou")
CLASSIFIERS = {"knn": "kNN", "logreg": "logistic regression", "linear": "linear"}


def compare(config: Mapping[str, Any]) -> dict[str, Figures]:
    """Train every run of `config["runs"]` (name -> its config), evaluate all, print one table.

    Runs resume, so repeating the command continues an interrupted one. Writes results.json,
    pictures and report.html to `config["output_dir"]`; every rank must call this.
    """
    config = in_folders(plain(config))
    folder, runs = Path(config["output_dir"]), config["runs"]
    check_folder(folder)
    summaries = {}
    with session(config["device"]) as device:
        for name, run in runs.items():
            if distributed.is_main():
                say(f"--- training: {name}, in {run['output_dir']}")
            summaries[name] = train(run)
        figures = {name: _figures(runs[name], summaries[name], device) for name in runs}
        if distributed.is_main():
            _show(folder, figures, runs)
            _draw(folder, runs, device)
        distributed.barrier()
    return figures


def _figures(run: Mapping[str, Any], summary: Mapping[str, Any], device: torch.device) -> Figures:
    folder = Path(run["output_dir"])
    data = {split: make_data(run["data"], split) for split in ("train", "val")}
    nets = {
        "untrained": make_net(run["backbone"], None, seed=run["seed"]).to(device),
        "trained": make_net(run["backbone"], str(folder)).to(device),
    }
    figures: Figures = {}
    if distributed.is_main():
        say(f"--- evaluating the untrained net: {folder.name}, in {folder / 'untrained'}")
    for name, node in run["probes"].items():
        judged = build(node)(nets["untrained"], data, folder / "untrained", 0)
        for key in (key for key in judged if key.endswith(SHOWN)):
            label = _label(key)
            figures[f"{label}, trained teacher"] = summary[f"{name}/{key}"]
            figures[f"{label}, untrained"] = judged[key]
    images = _some_images(run, data["val"])
    figures["parameters"] = sum(p.numel() for p in nets["trained"].parameters())
    figures["multiply-adds"] = multiply_adds(nets["trained"], images.shape[-1])
    figures["equivariance error of the octic half"] = worst_error(
        layer_errors(nets["trained"], images)
    )
    return figures | _speed(folder)


def _speed(folder: Path) -> Figures:
    """Steps, seconds in the loop and images per second, from the log with all resumed parts.

    The rate is the median over the log's lines, so that slow first steps or other load on the
    machine do not count against one net alone.
    """
    steps, seconds, rates = 0, 0.0, []
    for line in read_metrics(folder / METRICS):
        if "steps_per_second" in line:
            seconds += (line["step"] - steps) / line["steps_per_second"]
            steps = line["step"]
            rates.append(line["images_per_second"])
    rate = median(rates) if rates else None
    return {"steps": steps, "training time (s)": seconds, "training images/s, median": rate}


def _show(folder: Path, figures: Mapping[str, Figures], runs: Mapping[str, Any]) -> None:
    keys = dict.fromkeys(key for part in figures.values() for key in part)
    rows = [(key, *(_written(key, part.get(key)) for part in figures.values())) for key in keys]
    probes = next(iter(runs.values()))["probes"]
    protocol = {name: getattr(build(node), "protocol", {}) for name, node in probes.items()}
    write_results(folder, "comparison", protocol=protocol, figures=figures)
    words = "; ".join(f"{name}: {in_words(entry)}" for name, entry in protocol.items())
    print_table("what was learnt", ("", *figures), rows, protocol=words)


def _draw(folder: Path, runs: Mapping[str, Any], device: torch.device) -> None:
    logs = {name: Path(run["output_dir"]) / METRICS for name, run in runs.items()}
    pictures = {"losses": draw_losses(logs, folder / "losses.png")}
    for name, run in runs.items():
        net = make_net(run["backbone"], run["output_dir"]).to(device)
        data = {split: make_data(run["data"], split) for split in ("train", "val")}
        # At twice the training size there are four times as many patches to show.
        images = _some_images(run, data["val"], count=6, enlarged=2)
        pictures[f"PCA of the patches, {name}"] = draw_pca_maps(
            net, images, folder / f"pca_{name}.png"
        )
        size = _image_size(run)
        pictures[f"nearest neighbours, {name}"] = draw_neighbours(
            net,
            data["train"],
            data["val"],
            folder / f"neighbours_{name}.png",
            transform=evaluation_transform(resize_size=size, crop_size=size),
        )
    for what, path in pictures.items():
        say(f"picture: {what}: {path}")
    curves = ", ".join(f"{run['output_dir']}/{CURVES}" for run in runs.values())
    say(f"all curves of each run: {curves}; all figures: {folder / RESULTS}")
    say(f"all of it as one page: {write_report(folder)}")


def _some_images(
    run: Mapping[str, Any], dataset: ImageDataset, *, count: int = 8, enlarged: int = 1
) -> torch.Tensor:
    size = _image_size(run) * enlarged
    return sample_images(dataset, size=size, count=min(count, len(dataset)))


def _image_size(run: Mapping[str, Any]) -> int:
    return run["backbone"].get("img_size", 224)


def _label(key: str) -> str:
    """A probe's figure in words: `knn10_top1`, `linear_top1`, `logreg_miou`."""
    stem, _, measure = key.rpartition("_")
    name = stem.rstrip("0123456789")
    words = CLASSIFIERS.get(name, name)
    if measure == "miou":
        return f"segmentation mIoU, {words}"
    k = stem.removeprefix(name)
    return f"{words} top-1, k = {k}" if k else f"{words} top-1"


def _written(key: str, value: float | None) -> str | None:
    if value is None:
        return None
    if "top-1" in key or "mIoU" in key:
        return f"{value:.1f} %"
    if "error" in key:
        return f"{value:.1e}"
    if key in ("parameters", "multiply-adds"):
        return f"{value / 1e6:.2f} M"
    return f"{value:.0f}"
