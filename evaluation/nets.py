"""The network that a backbone node of a config and a file of weights describe, ready to judge.

`theirs` is the backbone node of the run that exported a file, which the file's metadata hold.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.progress import say
from utils import distributed
from utils.config.build import build, is_own
from utils.data.classes import class_list, mismatch
from utils.data.images import ImageDataset
from utils.errors import UserError, as_user_error, one_line
from utils.ranges import check_path
from utils.run_files import EXPORTED, FORMERLY, IN_HUB
from vit.finetune import head_of
from vit.weights import constructor_of as constructor_in
from vit.weights import load_net, read_metadata, read_state

FROM_FILE = "evaluation.adapters.encoder_from_file"
IDENTITY = ("_target_", "model_name")  # the keys of a backbone node that name its model
HEADS = tuple(
    f".{head}.weight"
    for head in (
        *("head", "fc", "classifier", "head.fc", "head.l", "head.classifier", "heads.head"),
        *("head.fc2", "head.fc.fc2", "head.linear", "head.classifier.linear"),
        *("last_linear", "classif"),
    )
)


def build_net(backbone: Mapping[str, Any], *, seed: int = 0) -> nn.Module:
    """Build the net of a backbone node, with the random initialisation of a seed."""
    torch.manual_seed(seed)
    return build({**backbone, "_partial_": True})()


def make_net(backbone: Mapping[str, Any], weights: str | None, *, seed: int = 0) -> nn.Module:
    """Build the net of a backbone node, in eval mode; every key of the weights must match.

    `weights` is a file or a run folder. A file that we exported names the keywords its net was
    built with; they fill what the node leaves open. If the weights do not fit because they are of
    another model, the UserError names that model.
    """
    path = weights_file(weights)
    theirs = constructor_of(path)
    net = build_net(as_built(backbone, theirs), seed=seed)
    if not hasattr(net, "features"):
        raise UserError(
            f"{backbone['_target_']} is no Backbone: it has no features(); use backbone=timm "
            "backbone.model_name=NAME for one that is registered with timm"
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


def make_classifier(
    backbone: Mapping[str, Any], state: Mapping[str, Tensor] | None, path: str | None, *, seed: int
) -> nn.Module:
    """The net in eval mode; every key of the weights, in any published spelling, must match.

    UserError for a net without a classifier.
    """
    net = build_net(backbone, seed=seed)
    if state is not None:
        load_strictly(net, state, path)
    if not has_classes(net):
        raise UserError(f"{name_of(backbone)} has no classifier; probe its features instead")
    return net.eval()


def has_classes(net: nn.Module) -> bool:
    """Whether a net ends in a classifier, of one layer or of several."""
    inner = getattr(net, "net", net)
    head, names = head_of(inner), inner.state_dict()
    several = num_classes_of(inner) and any(name.startswith(f"{head}.") for name in names)
    return f"{head}.weight" in names or bool(several)


def num_classes_of(net: object) -> int:
    """Number of logits that `net(images)` gives; 0 where it gives none."""
    return int(getattr(getattr(net, "net", net), "num_classes", 0) or 0)


def load_strictly(net: nn.Module, state: Mapping[str, Tensor], path: str | None) -> None:
    """Load weights, every key of which must match; UserError that names the file otherwise.

    Weights that are not finite are refused as well, as figures of them would mean nothing.
    """
    try:
        load_net(net, state)
    except ValueError as error:
        raise UserError(f"{path}: {with_articles(one_line(error))}") from None
    broken = [name for name, weight in net.named_parameters() if not weight.isfinite().all()]
    broken += [name for name, buffer in net.named_buffers() if buffer.isnan().any()]
    if broken:
        raise UserError(f"{path} holds weights that are not finite ({broken[0]})")


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


def complete(
    backbone: Mapping[str, Any],
    metadata: Mapping[str, str],
    state: Mapping[str, Tensor] | None,
    dataset: ImageDataset | None,
) -> dict[str, Any]:
    """The backbone node `as_built`, with the number of classes of its head.

    Where the node leaves that open it is the file's, or else that of the data set. UserError if the
    file is of another model.
    """
    theirs = json.loads(metadata.get("constructor", "{}"))
    if wrong := other_model(backbone, theirs):
        raise UserError(wrong)
    filled, wraps = as_built(backbone, theirs), isinstance(backbone.get("backbone"), Mapping)
    if wraps and theirs.get("_target_") == backbone["_target_"]:
        return filled  # the file is of the whole, which has its classes
    return _with_classes(filled, state, dataset)


def _with_classes(
    backbone: Mapping[str, Any], state: Mapping[str, Tensor] | None, dataset: ImageDataset | None
) -> dict[str, Any]:
    """The node with the classes of a file or a data set, those of the inner net if it wraps one."""
    inner = backbone.get("backbone")
    if isinstance(inner, Mapping):
        return {**backbone, "backbone": {**_with_classes(inner, state, dataset), "_partial_": True}}
    backbone = dict(backbone)
    if "num_classes" in backbone or backbone.get("pretrained"):
        return {"num_classes": 1000, **backbone}
    if brings_weights(backbone):  # which include the head
        return {"num_classes": None, **backbone} if _from_hub(backbone) else backbone
    count = None if state is None else count_classes(state)
    if count is None and dataset is not None:
        count = len(class_list(dataset))
    return backbone if count is None else {**backbone, "num_classes": count}


def count_classes(state: Mapping[str, Tensor]) -> int | None:
    """Number of classes of the head in a file, by the names of heads in our models and timm's.

    None if there is no head.
    """
    found = [name for name in state if f".{name}".endswith(HEADS)]
    # A layer within a block may be called fc too; the head lies outside of all blocks.
    return len(state[min(found, key=lambda name: name.count("."))]) if found else None


def other_model(backbone: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """An error line if a file's net is of another model than the node; "" otherwise."""
    if not theirs:
        return ""
    inner, name = backbone.get("backbone"), name_of(theirs)
    remedy = f"--model {name}"
    if is_own(theirs.get("_target_")):  # --model knows registered names alone
        remedy = f"backbone._target_={theirs['_target_']} in its place"
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


def name_of(backbone: Mapping[str, Any]) -> str:
    """The registered name of a backbone node's model; for an encoder of a file, the file's stem."""
    if backbone["_target_"] == FROM_FILE and backbone.get("path"):
        return Path(backbone["path"]).stem
    return backbone.get("model_name") or backbone["_target_"].split(".")[-1]


def weights_file(weights: str | None) -> str | None:
    """The path of a file of weights; for a run folder, of its exported weights."""
    if weights is None or weights == "":
        return weights
    check_path("weights", weights)
    given = Path(weights).expanduser()  # a shell does not expand ~ after key=
    if not given.is_dir():
        return str(given)
    found = [path for name in (EXPORTED, FORMERLY) if (path := given / name).is_file()]
    if not found and (given / IN_HUB).is_file():
        raise UserError(f"{weights} is no run folder; give {given / IN_HUB}")
    if not found:
        raise UserError(f"{weights} is a folder without {EXPORTED}: the run is not finished")
    return str(found[0])


def read_weights(
    weights: str | None, dataset: ImageDataset | None
) -> tuple[str | None, dict[str, str], dict[str, Tensor] | None]:
    """Path, metadata and weights of a file or run folder; (None, {}, None) without one.

    UserError for a file that cannot be read, and if its classes are not those of the data set.
    """
    path = weights_file(weights)
    if not path:
        return path, {}, None
    with as_user_error():
        metadata, state = read_metadata(path), read_state(path)
    wrong = mismatch(metadata, dataset) if dataset is not None else None
    if wrong:
        raise UserError(f"{path}: {wrong}; figures would mean nothing")
    return path, metadata, state


def constructor_of(path: str | None) -> dict[str, Any]:
    """The backbone node that a file exported by us was built from; empty for other files."""
    with as_user_error():
        return constructor_in(path) if path else {}


def brings_weights(backbone: Mapping[str, Any]) -> bool:
    """Whether the net of a backbone node, or the one it wraps, comes with weights.

    Pretrained, from a hub, or made by a file of the user's, which loads them itself.
    """
    inner = backbone.get("backbone")
    if isinstance(inner, Mapping) and brings_weights(inner):
        return True
    given = backbone.get("pretrained") or backbone.get("weights")
    return bool(given or _from_hub(backbone) or backbone.get("_target_") == FROM_FILE)


def _from_hub(backbone: Mapping[str, Any]) -> bool:
    return ":" in str(backbone.get("model_name", ""))


def warn_if_random(
    backbone: Mapping[str, Any], weights: str | None, *, flag: str, doing: str
) -> None:
    """Say on the main rank that what is done is done to a net without trained weights."""
    if distributed.is_main() and not weights and not brings_weights(backbone):
        say(f"no weights given ({flag} FILE): {doing} the random initialisation")


def weights_in_words(backbone: Mapping[str, Any], path: str | Path | None) -> str:
    """The weights in words: the file, or what the net has without a file."""
    return weights_of(backbone, path) or "random initialisation"


def weights_of(backbone: Mapping[str, Any], path: str | Path | None) -> str | None:
    """What a protocol states of the weights: the file, or "its own"; None for random ones."""
    if path:
        return str(path)
    return "its own" if brings_weights(backbone) else None


def _read(path: str) -> dict[str, Tensor]:
    with as_user_error():
        return read_state(path)


def with_articles(words: str) -> str:
    """Words with "a" replaced by "an" before a vowel."""
    return re.sub(r"\b(a)(?= [aeioAEIO])", "an", words)
