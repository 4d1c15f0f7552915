"""The network of an exported file, made from the file alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from vit.adapters import TimmBackbone, is_registered
from vit.weights import constructor_of, load_net, naming_file, read_state


def build_from(path: str | Path) -> nn.Module:
    """The network that a file exported by a run is of, with the file's weights, in eval mode.

    A file may come from anyone, so it can name no more than a model that is registered with timm;
    octic's are, those of other packages once these are imported. Raises ValueError for a file that
    names none, and as `load_weights`.
    """
    state, made = read_state(path), constructor_of(path)
    if not made:
        raise ValueError(f"{path} does not say which network it is of; build it, then load_weights")
    target = made["_target_"]
    options = {key: value for key, value in made.items() if not key.startswith("_")}
    module, _, name = target.rpartition(".")
    adapted = target == "vit.adapters.timm_backbone"
    name = options.pop("model_name", name) if adapted else name
    make: Any = timm.model_entrypoint(name) if is_registered(name) else None
    if make is None or not (adapted or make.__module__ == module):
        raise ValueError(
            f"{path} is of {name if adapted else target}, which is not registered with timm here; "
            "import its module, or build it and load_weights"
        )
    options |= {"pretrained": False, "num_classes": _classes_of(state, name, options)}
    net = TimmBackbone(name, **options) if adapted else make(**options)
    with naming_file(path):
        load_net(net, state)
    return net.eval()


def _classes_of(state: Mapping[str, Tensor], name: str, options: Mapping[str, Any]) -> int:
    """The number of classes that the options say, else that of the head in a file."""
    if options.get("num_classes") is not None:
        return int(options["num_classes"])
    config = timm.get_pretrained_cfg(name)
    head = (config and config.classifier) or "head"
    weight = f"{head if isinstance(head, str) else head[0]}.weight"
    found = [tensor for key, tensor in state.items() if key.removeprefix("net.") == weight]
    return len(found[0]) if found else 0
