"""The nets of a comparison and their plain twins: from names to backbone nodes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from evaluation.nets import build_net
from utils.config.build import is_own, resolve
from utils.config.command_line import unknown_model
from utils.config.files import backbone_names, backbone_node
from utils.config.signature import keywords_of
from utils.errors import UserError, one_line

Node = dict[str, Any]
ALL = "all"
# Adapters for other nets, which also need a model name or a file.
ADAPTERS = ("timm", "torchvision", "file")
WRAPPERS = ("symmetrized", "reduced")  # wrap one of our nets by default; not part of `all`
USUAL_SIZE = 224  # of nets that do not say another


class Group(NamedTuple):
    """Nets that are measured in turn: the twin, if there is one, and those compared with it."""

    twin: str | None
    names: tuple[str, ...]


def registered(size: int | None = None) -> list[str]:
    """Names in configs/backbone that need no other keyword.

    size: only those that take images of so many pixels a side.
    """
    names = [name for name in _named() if name not in WRAPPERS]
    if size is None:
        return names
    return [name for name in names if backbone_node(name).get("img_size", size) == size]


def make_groups(
    names: Sequence[str], twins: Mapping[str, str | None], *, size: int | None = None
) -> list[Group]:
    """Group nets with their twin, which is added if it was not asked for; others are alone.

    A twin of null is none. Groups are in the order of their first net among `names`.
    size: `all` means those that take it.
    """
    chosen = [word for name in names for word in (registered(size) if name == ALL else [name])]
    members: dict[str, list[str]] = {}
    for name in dict.fromkeys(chosen):
        members.setdefault(twins.get(name) or name, []).append(name)
    groups = []
    for twin, group in members.items():
        others = [name for name in group if name != twin]
        groups.append(Group(twin if others else None, (twin, *others)))
    return groups


def own_size(name: str, keywords: Mapping[str, Any] | None = None) -> int:
    """Pixels a side that a net is for by its keywords, its config or timm; 224 if none says."""
    keywords = keywords or {}
    if "_target_" in keywords or is_own(name):
        size = keywords.get("img_size")
    elif name in _named():
        size = {**backbone_node(name), **keywords}.get("img_size")
    else:
        config = _timm_config(name)
        size = config and config.input_size[-1]
    return size if isinstance(size, int) else USUAL_SIZE


def find_backbone(
    name: str, *, size: int | None = None, keywords: Mapping[str, Any] | None = None
) -> Node:
    """The node of our config of that name, else of timm's model, for images of `size` pixels.

    A dotted name in a package that the environment adds is a net of the user's.
    size: None stands for the net's own.
    keywords: further keywords of the constructor; with a `_target_`, all of the node.
    UserError for an unknown name, and for a size that is not the net's.
    """
    size = size or own_size(name, keywords)
    keywords = keywords or {}
    if "_target_" in keywords or is_own(name):
        node = {"_target_": name, **keywords}
        sized = "img_size" in keywords_of(resolve(node["_target_"]))
    elif name in _named():
        node, sized = {**backbone_node(name), **keywords}, size != USUAL_SIZE
    else:
        return _of_timm(name, size)
    own = node.get("img_size", size)
    if own != size:
        raise UserError(f"{name} is for images of {own} pixels: size={own}, not {size}")
    return {**node, "img_size": size} if sized else node


def _timm_config(name: str) -> Any:
    import timm

    if name in ADAPTERS:
        raise UserError(f"{name} is an adapter, which needs a model name: give one, as resnet50")
    if not timm.is_model(name.split(".")[0]):
        raise UserError(unknown_model(name))
    return timm.get_pretrained_cfg(name, allow_unregistered=True)


def _of_timm(name: str, size: int) -> Node:
    config = _timm_config(name)
    node: Node = {"_target_": "vit.adapters.timm_backbone", "model_name": name}
    if config is not None and config.num_classes != 1000:
        node["num_classes"] = config.num_classes or 0
    else:
        node["num_classes"] = 1000
    resized = config is not None and config.fixed_input_size and config.input_size[-1] != size
    return {**node, "img_size": size} if resized else node


def _named() -> list[str]:
    return [name for name in backbone_names() if name not in ADAPTERS]


def make_net(name: str, node: Node, device: torch.device | str, *, seed: int = 0) -> nn.Module:
    """The net with random weights on `device`; UserError, with its name, if it cannot be built."""
    try:
        with torch.device(device):
            return build_net(node, seed=seed)
    except ValueError as error:
        raise UserError(f"{name}: {one_line(error)}") from error
