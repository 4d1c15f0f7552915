"""Write a net as a torch.export program, as ONNX or in the hub's format (experiments/export.py)."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from evaluation.image_size import image_size_of
from evaluation.nets import (
    build_net,
    complete,
    count_classes,
    has_classes,
    load_strictly,
    name_of,
    warn_if_random,
    weights_file,
    weights_in_words,
)
from evaluation.progress import say
from utils import distributed
from utils.config.build import plain, resolve
from utils.data.classes import NAMES
from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from utils.errors import UserError, as_user_error
from utils.folders import check_folder, make_folder
from utils.joining import session
from vit import export, hub
from vit.weights import read_metadata, read_state

FILES = {"torch_export": "model.pt2", "onnx": "model.onnx"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export_net(config: Mapping[str, Any]) -> dict[str, Any]:
    """Build the net, load its weights strictly, write the file, reload it and compare outputs.

    Reads the keys of configs/export.yaml. Returns the `path` that was written and the `difference`,
    max |difference| / max |output|; UserError if it exceeds 1e-4, and for every mistake.
    """
    config = plain(config)
    check_folder(config["output_dir"])
    with session("cpu"):
        if not distributed.is_main():
            return {}
        path = weights_file(config["weights"])
        with as_user_error():
            metadata = read_metadata(path) if path else {}
            net, backbone = make_any_net(config, path, metadata)
            write = _write_for_hub if config["format"] == "hub" else _write_program
            return write(config, net, backbone, json.loads(metadata.get(NAMES, "[]")))


def make_any_net(
    config: Mapping[str, Any], path: str | None, metadata: Mapping[str, str]
) -> tuple[nn.Module, dict[str, Any]]:
    """The net in eval mode on the CPU, with or without classes, and the complete backbone node."""
    state = read_state(path) if path else None  # first: a file that is not there names no net
    backbone = config["backbone"] or json.loads(metadata.get("constructor", "null"))
    if backbone is None:
        raise UserError(f"{path} does not say which net it is of; give --model NAME")
    if ":" in backbone.get("model_name", ""):
        backbone = {"num_classes": None, **backbone}  # a folder's or repository's own classes
    backbone = _with_classes(backbone, metadata, state)
    net = build_net(backbone, seed=config["seed"])
    if state is not None:
        load_strictly(net, state, path)
    warn_if_random(backbone, path, flag="--weights", doing="exporting")
    return net.eval().requires_grad_(False), backbone


def _with_classes(
    backbone: Mapping[str, Any], metadata: Mapping[str, str], state: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """The node with keywords filled from the weights, such as the number of classes."""
    if state is None or not _takes_classes(backbone):
        return dict(backbone)
    backbone = {"num_classes": count_classes(state) or 0, **backbone}
    return complete(backbone, metadata, state, None)


def _takes_classes(backbone: Mapping[str, Any]) -> bool:
    parameters = inspect.signature(resolve(backbone["_target_"])).parameters.values()
    return any(part.name == "num_classes" or part.kind == part.VAR_KEYWORD for part in parameters)


def _write_program(
    config: Mapping[str, Any], net: nn.Module, backbone: Mapping[str, Any], names: list[str]
) -> dict[str, Any]:
    kind = config["format"]
    if kind == "onnx":
        _require(ONNX_PACKAGES)
    size, output = config["size"] or image_size_of(net), config["output"]
    if output == "auto":
        output = "logits" if has_classes(net) else "features"
    source = weights_in_words(backbone, config["weights"])
    say(f"{name_of(backbone)}, weights: {source}: {output} at {size} x {size} pixels")
    program = export.trace(net, size=size, output=output)
    mean, std = normalisation(net)
    description = {"model": name_of(backbone), "output": output, "size": size}
    description |= {"mean": mean, "std": std, "class_names": names}
    path = make_folder(config["output_dir"]) / FILES[kind]
    (export.save_onnx if kind == "onnx" else export.save_program)(program, path, description)
    say(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    channels = getattr(net, "in_chans", 3)
    pixels = f"RGB in 0..1, minus {mean}, divided by {std}" if channels == 3 else "as in training"
    say(f"input: images [batch, {channels}, {size}, {size}], {pixels}")
    difference = export.largest_difference(path, net, size=size, output=output)
    return _judged(path, difference, "loaded in a process without octic, at batch 1 and 3")


def _write_for_hub(
    config: Mapping[str, Any], net: nn.Module, backbone: Mapping[str, Any], names: list[str]
) -> dict[str, Any]:
    if config["push"]:
        hub.check_push(config["push"])  # before the work, not after it
    folder, size = make_folder(config["output_dir"]), config["size"]
    source = weights_in_words(backbone, config["weights"])
    say(f"{name_of(backbone)}, weights: {source}: in the Hugging Face hub's format")
    about: dict[str, Any] = {"options": backbone, "class_names": names, "size": size}
    hub.save_to_folder(net, folder, **about)
    weights = (folder / "model.safetensors").stat().st_size / 1e6
    say(f"written: {folder}/: config.json, model.safetensors ({weights:.1f} MB)")
    side = size or image_size_of(net)
    batches = [export.example_images(net, side, batch=batch) for batch in (1, 3)]
    how = f'loaded by timm.create_model("local-dir:{folder}", pretrained=True), at batch 1 and 3'
    result = _judged(folder, hub.largest_difference(net, folder, batches), how)
    if config["push"]:
        say(f"pushed: {hub.push(net, config['push'], **about)}")
    return result


def _judged(path: Path, difference: float, how: str) -> dict[str, Any]:
    bound = export.TOLERANCE
    if not difference <= bound:
        raise UserError(
            f"{path} does not compute what the net does: largest difference {difference:.1e} of "
            f"the largest output, {how}; {bound:.0e} is allowed"
        )
    say(f"{how}: largest difference {difference:.1e} of the largest output ({bound:.0e} allowed)")
    return {"path": str(path), "difference": difference}


def normalisation(net: nn.Module) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of a net's input normalisation; ImageNet's by default."""
    described = getattr(getattr(net, "net", net), "pretrained_cfg", None) or {}
    mean, std = described.get("mean", IMAGENET_MEAN), described.get("std", IMAGENET_STD)
    return list(mean), list(std)


def _require(packages: tuple[str, ...]) -> None:
    from importlib.util import find_spec

    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UserError(f"ONNX needs {', '.join(missing)}: pip install {' '.join(missing)}")
