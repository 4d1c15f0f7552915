"""Evaluate one classifier; experiments/eval_deit.py runs this."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evaluation.data import data_for
from evaluation.judge import Figures, build_probes, run_probes
from evaluation.nets import (
    chosen_backbone,
    complete,
    make_classifier,
    name_of,
    read_weights,
    warn_if_random,
    weights_in_words,
    weights_of,
)
from evaluation.progress import say
from evaluation.published import published_figure
from utils import distributed
from utils.config.build import plain
from utils.data.classes import class_list
from utils.data.images import ImageDataset
from utils.joining import session
from utils.probing import protocol_of
from utils.results_file import write_results


def judge_classifier(config: Mapping[str, Any]) -> Figures:
    """Build net and data, load the weights strictly, run the probes into `output_dir`.

    Reads the keys of configs/eval/deit.yaml. A file exported by us names the keywords its net was
    built with and the classes it was trained on: UserError if the labels of data.val mean other
    classes. Returns figures as `probe/name`, on every rank.
    """
    config = plain(config)
    folder = Path(config["output_dir"])
    with session(config["device"]) as device:
        probes = build_probes(config)
        # The throughput probe alone needs no images.
        data = data_for(probes.values(), config["data"])
        dataset = data.get("val")
        path, metadata, state = read_weights(config["weights"], dataset)
        backbone = complete(chosen_backbone(config), metadata, state, dataset)
        net = make_classifier(backbone, state, path, seed=config["seed"]).to(device)
        if distributed.is_main():
            _say_what_is_judged(backbone, path, dataset)
        for probe in probes.values():
            if hasattr(probe, "check"):  # its requirements on the net, before anything is measured
                probe.check(net)
        judged = {
            "backbone": name_of(backbone),
            "weights": weights_of(backbone, path),
            "data": repr(dataset),
        }

        def report(name: str, probe: Callable, figures: Figures) -> None:
            protocol = judged | protocol_of(name, probe)
            say(f"written: {write_results(folder, name, protocol=protocol, figures=figures)}")

        found = run_probes(probes, lambda _, probe: probe(net, data, folder, 0), report)
        if distributed.is_main() and dataset is not None:
            _say_published(backbone, metadata, path, dataset)
    return found


def _say_what_is_judged(
    backbone: Mapping[str, Any], path: str | None, dataset: ImageDataset | None
) -> None:
    warn_if_random(backbone, path, flag="--eval", doing="judging")
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
