"""Evaluate one net with the probes of a config; experiments/eval_dinov2_*.py run this."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.progress import say
from evaluation.results import in_words, print_figures, write_results
from utils import distributed
from utils.checkpoints.exported import EXPORTED, FORMERLY
from utils.config.build import build, plain
from utils.data.images import ImageDataset
from utils.errors import UserError
from utils.folders import check_folder
from utils.probing import numbers
from vit.weights import load_net, read_metadata, read_state

IDENTITY = ("_target_", "model_name")  # the keys of a backbone node that name its model


def judge(config: Mapping[str, Any]) -> dict[str, float]:
    """Build net and data, load the weights strictly, run every probe into `output_dir`/<probe>.

    Reads the keys of configs/evaluate.yaml. Returns figures as `probe/name`, on every rank.
    """
    config = dict(plain(config))
    folder = Path(config["output_dir"])
    with distributed.session(config["device"]) as device:
        config["backbone"] = chosen_backbone(config)
        probes = {name: build(node) for name, node in config["probes"].items() if node}
        for name in probes:
            check_folder(folder / name)
        net = make_net(config["backbone"], config["weights"], seed=config["seed"]).to(device)
        data = {split: make_data(config["data"], split) for split in splits_of(probes.values())}
        if distributed.is_main():
            _say_what_is_judged(config, data)
        results = {}
        for name, probe in probes.items():
            results[name] = numbers(name, probe(net, data, folder / name, 0))
            if distributed.is_main():  # at once, so that an error in a later probe cannot lose it
                _report(config, folder, name, results[name], probe)
        distributed.barrier()
    return {f"{name}/{key}": value for name, part in results.items() for key, value in part.items()}


def splits_of(probes: Iterable[Callable]) -> list[str]:
    """The splits of `data` that the probes read; a probe without `splits` reads both."""
    asked = {split for probe in probes for split in getattr(probe, "splits", ("train", "val"))}
    return sorted(asked)


def make_net(backbone: Mapping[str, Any], weights: str | None, *, seed: int = 0) -> nn.Module:
    """Build the net of a backbone node, in eval mode; every key of the weights must match.

    `weights` is a file or a run folder. A file that we exported names the keywords its net was
    built with; they fill what the node leaves open. If the weights do not fit because they are of
    another model, the UserError names that model.
    """
    path = weights_file(weights)
    theirs = constructor_of(path)
    torch.manual_seed(seed)
    net = build({**as_built(backbone, theirs), "_partial_": True})()
    if not hasattr(net, "features"):
        raise UserError(
            f"{backbone['_target_']} is no Backbone: it has no features(); use backbone=timm"
        )
    if path:
        state = _read(path)
        try:
            load_strictly(net, state, path)
        except UserError:
            if other := other_model(backbone, theirs):
                raise UserError(f"{path}: {other}") from None
            raise
    return net.eval()


def load_strictly(net: nn.Module, state: Mapping[str, Tensor], path: str | None) -> None:
    """Load weights, every key of which must match; UserError that names the file otherwise.

    Weights that are not finite are refused as well, as figures of them would mean nothing.
    """
    try:
        load_net(net, state)
    except ValueError as error:
        raise UserError(f"{path}: {with_articles(' '.join(str(error).split()))}") from None
    for name, weight in net.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"{path} holds weights that are not finite ({name})")


def weights_file(weights: str | None) -> str | None:
    """The path of a file of weights; for a run folder, of its exported weights."""
    if not weights:
        return weights
    given = Path(weights).expanduser()  # a shell does not expand ~ after key=
    if not given.is_dir():
        return str(given)
    found = [path for name in (EXPORTED, FORMERLY) if (path := given / name).is_file()]
    if not found:
        raise UserError(f"{weights} is a folder without {EXPORTED}: the run is not finished")
    return str(found[0])


def _read(path: str) -> dict[str, Tensor]:
    try:
        return read_state(path)
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None


def chosen_backbone(config: Mapping[str, Any]) -> dict[str, Any]:
    """The backbone node of a config; if the command line named no model, that of the weights."""
    node = dict(config["backbone"])
    if config.get("backbone_named", True):
        return node
    theirs = constructor_of(weights_file(config["weights"]))
    if not theirs or not other_model(node, theirs):
        return node
    if distributed.is_main():
        of = with_articles(f"is of a {name_of(theirs)}")
        say(f"no --model was given; {config['weights']} {of}")
    return {**theirs, **{key: node[key] for key in node if key not in (*IDENTITY, "_partial_")}}


def constructor_of(path: str | None) -> dict[str, Any]:
    """The backbone node that a file exported by us was built from; empty for other files."""
    try:
        return json.loads(read_metadata(path).get("constructor", "{}")) if path else {}
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None


def as_built(backbone: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The backbone node, with keywords that it leaves open filled from a file's constructor.

    `theirs`: the node that the exported file was built from. For a net that wraps another one it
    may describe the whole, or the inner net alone.
    """
    inner = backbone.get("backbone")
    if not isinstance(inner, Mapping):
        return {**({} if other_model(backbone, theirs) else theirs), **backbone}
    if theirs.get("_target_") == backbone["_target_"]:
        part = theirs["backbone"]
        part = part if other_model(inner, part) else {**part, **inner}
        return {**theirs, **backbone, "backbone": {**part, "_partial_": True}}
    return {**backbone, "backbone": {**as_built(inner, theirs), "_partial_": True}}


def other_model(backbone: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """An error line if a file's net is of another model than the node; "" otherwise."""
    if not theirs:
        return ""
    inner, name = backbone.get("backbone"), name_of(theirs)
    remedy = f"--model {name}"
    if isinstance(inner, Mapping):
        if theirs.get("_target_") == backbone["_target_"]:
            return ""
        backbone, remedy = inner, f"backbone.backbone._target_={theirs['_target_']}"
        if theirs.get("model_name"):
            remedy = f"+backbone@backbone.backbone=timm backbone.backbone.model_name={name}"
    if all(theirs.get(key) == backbone.get(key) for key in IDENTITY):
        return ""
    words = f"these weights are of a {name}, not a {name_of(backbone)}; {remedy}"
    return with_articles(words)


def with_articles(words: str) -> str:
    """Words with "a" replaced by "an" before a vowel."""
    return re.sub(r"\b(a)(?= [aeioAEIO])", "an", words)


def make_data(node: Mapping[str, Any], split: str) -> ImageDataset:
    """The data set of one split of a `data` node."""
    if not node.get(split):
        raise UserError(f"data.{split} is missing: a probe needs training and validation images")
    return build(node[split])


def _say_what_is_judged(config: Mapping[str, Any], data: Mapping[str, ImageDataset]) -> None:
    backbone = config["backbone"]
    if not config["weights"] and not brings_weights(backbone):
        say("no weights given (--pretrained-weights FILE): judging the random initialisation")
    for split, dataset in data.items():
        say(f"{split}: {dataset!r}")


def brings_weights(backbone: Mapping[str, Any]) -> bool:
    """Whether the net of a backbone node comes with weights: pretrained, or from a hub."""
    named = ":" in str(backbone.get("model_name", ""))
    return bool(backbone.get("pretrained") or backbone.get("weights") or named)


def weights_in_words(backbone: Mapping[str, Any], path: str | Path | None) -> str:
    """The weights in words: the file, or what the net has without a file."""
    if path:
        return str(path)
    return "its own" if brings_weights(backbone) else "random initialisation"


def _report(
    config: Mapping[str, Any],
    folder: Path,
    name: str,
    figures: Mapping[str, float],
    probe: Callable,
) -> None:
    backbone = name_of(config["backbone"])
    protocol = getattr(probe, "protocol", {})
    if not isinstance(protocol, Mapping):
        raise UserError(
            f"probes.{name}: its protocol must be a mapping of what its figures depend on, such as "
            f"{{'crop_size': 224}}, not {protocol!r}"
        )
    protocol = dict(protocol)
    judged = {"backbone": backbone, "weights": config["weights"], "seed": config["seed"]}
    if protocol.get("seed", config["seed"]) != config["seed"]:  # the probe has its own seed
        judged["probe_seed"] = protocol["seed"]
    path = write_results(folder, name, protocol=protocol | judged, figures=figures)
    weights = weights_in_words(config["backbone"], config["weights"])
    print_figures(f"{backbone}, weights: {weights}", name, figures, protocol=in_words(protocol))
    say(f"written: {path}, {folder / name}")


def name_of(backbone: Mapping[str, Any]) -> str:
    """The registered name of a backbone node's model."""
    return backbone.get("model_name") or backbone["_target_"].split(".")[-1]
