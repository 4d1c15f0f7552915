"""Evaluate one net with the probes of a config; experiments/eval_dinov2_*.py run this."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evaluation.data import data_for
from evaluation.nets import (
    chosen_backbone,
    make_net,
    name_of,
    warn_if_random,
    weights_in_words,
    weights_of,
)
from evaluation.progress import say
from evaluation.results import in_words, print_figures
from utils import distributed
from utils.config.build import build, plain
from utils.data.images import ImageDataset
from utils.errors import UserError
from utils.folders import check_folder
from utils.joining import session
from utils.probing import numbers, protocol_of
from utils.results_file import write_results

Figures = dict[str, float]


def judge(config: Mapping[str, Any]) -> Figures:
    """Build net and data, load the weights strictly, run every probe into `output_dir`/<probe>.

    Reads the keys of configs/evaluate.yaml. Returns figures as `probe/name`, on every rank.
    """
    config = dict(plain(config))
    folder = Path(config["output_dir"])
    with session(config["device"]) as device:
        config["backbone"] = chosen_backbone(config)
        probes = build_probes(config)
        for name in probes:
            check_folder(folder / name)
        net = make_net(config["backbone"], config["weights"], seed=config["seed"]).to(device)
        data = data_for(probes.values(), config["data"])
        if distributed.is_main():
            _say_what_is_judged(config, data)
        return run_probes(
            probes,
            lambda name, probe: probe(net, data, folder / name, 0),
            lambda name, probe, figures: _report(config, folder, name, figures, probe),
        )


def build_probes(config: Mapping[str, Any]) -> dict[str, Callable]:
    """The probes of a config by name, without those that are switched off (null)."""
    nodes = {name: node for name, node in config["probes"].items() if node not in (None, {})}
    for name, node in nodes.items():
        if not isinstance(node, Mapping):
            raise UserError(f"probes.{name} must be {{_target_: ...}}, or null, not {node!r}")
    return build({"probes": nodes})["probes"]  # under their key, for error messages


def run_probes(
    probes: Mapping[str, Callable],
    run: Callable[[str, Callable], Mapping[str, float]],
    report: Callable[[str, Callable, Figures], None],
) -> Figures:
    """Run all probes, on every rank, and return their figures as `probe/name`.

    run: the figures of one. report: shows and writes them on the main rank, at once, so that an
    error in a later probe cannot lose them.
    """
    found: Figures = {}
    for name, probe in probes.items():
        figures = numbers(name, run(name, probe))
        if distributed.is_main():
            report(name, probe, figures)
        found |= {f"{name}/{key}": value for key, value in figures.items()}
    distributed.barrier()
    return found


def _say_what_is_judged(config: Mapping[str, Any], data: Mapping[str, ImageDataset]) -> None:
    backbone, weights = config["backbone"], config["weights"]
    warn_if_random(backbone, weights, flag="--pretrained-weights", doing="judging")
    for split, dataset in data.items():
        say(f"{split}: {dataset!r}")


def _report(
    config: Mapping[str, Any], folder: Path, name: str, figures: Figures, probe: Callable
) -> None:
    backbone = name_of(config["backbone"])
    protocol = protocol_of(name, probe)
    weights = weights_of(config["backbone"], config["weights"])
    judged = {"backbone": backbone, "weights": weights, "seed": config["seed"]}
    if protocol.get("seed", config["seed"]) != config["seed"]:  # the probe has its own seed
        judged["probe_seed"] = protocol["seed"]
    path = write_results(folder, name, protocol=protocol | judged, figures=figures)
    weights = weights_in_words(config["backbone"], config["weights"])
    print_figures(f"{backbone}, weights: {weights}", name, figures, protocol=in_words(protocol))
    say(f"written: {path}, {folder / name}")
