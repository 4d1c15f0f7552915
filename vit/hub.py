"""Networks in the Hugging Face hub's format, as timm writes and reads it: a folder or a repository.

`config.json` names the registered model and the keywords it was built with, so that other widths,
depths and patch sizes than the registered ones survive; `model.safetensors` holds the weights.
`timm.create_model("local-dir:FOLDER" or "hf-hub:user/name", pretrained=True)` reads them, for our
octic models after `import octic`.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import push_to_hf_hub, save_for_hf
from torch import nn

from vit.adapters import TimmBackbone
from vit.backbone import eval_mode
from vit.export import relative_difference

# Packages (by prefix) whose errors mean trouble with network or account, not a bug of ours.
NETWORK = ("httpx", "httpcore", "huggingface_hub", "requests", "urllib3")
_NOT_OPTIONS = {"_target_", "_partial_", "model_name", "pretrained"}


def save_to_folder(
    net: nn.Module,
    folder: Path,
    *,
    options: Mapping[str, Any],
    class_names: Sequence[str] = (),
    size: int | None = None,
) -> None:
    """Write config.json and model.safetensors of a registered network or of timm's in its adapter.

    options: the keywords it was built with. class_names: written where there is one per class.
    size: pixels a side that images should have; the network's own by default. Raises
    ValueError for a network that timm could not build again.
    """
    registered = _registered(net)
    save_for_hf(
        registered,
        str(folder),
        safe_serialization=True,
        **_description(net, options, class_names, size),
    )


def push(
    net: nn.Module,
    repository: str,
    *,
    options: Mapping[str, Any],
    class_names: Sequence[str] = (),
    size: int | None = None,
) -> str:
    """Upload the same two files to `user/name` on the hub; returns its address.

    Raises ValueError, in one line, without a token, a network or the right to write there.
    """
    registered = _registered(net)
    check_push(repository)
    try:
        push_to_hf_hub(
            registered,
            repository,
            safe_serialization=True,
            **_description(net, options, class_names, size),
        )
    except Exception as error:
        if not type(error).__module__.startswith(NETWORK) and not isinstance(error, OSError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"could not push to {repository}: {reason}") from error
    return f"hf-hub:{repository}"


def check_push(repository: str) -> None:
    """ValueError, in one line, for what is no name on the hub and where no token is at hand."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id

    spelt = f"{repository!r} is no repository of the hub; it is spelt user/name"
    if repository.count("/") != 1:
        raise ValueError(spelt)
    try:
        validate_repo_id(repository)
    except ValueError as error:
        reason = str(error).splitlines()[0].removesuffix(f": {repository!r}.")
        raise ValueError(f"{spelt}: {reason}") from error
    if not get_token():
        raise ValueError(
            "no token of the Hugging Face hub here: run `hf auth login`, or set HF_TOKEN"
        )


@torch.no_grad()
def largest_difference(net: nn.Module, folder: Path, images: Sequence[torch.Tensor]) -> float:
    """Max |difference| / max |output| between a network and the one that timm makes of a folder."""
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    worst = 0.0
    for batch in images:
        with eval_mode(net):
            ours, theirs = net(batch), again(batch)
        worst = max(worst, relative_difference(ours, theirs))
    return worst


def _registered(net: nn.Module) -> nn.Module:
    registered = net.net if isinstance(net, TimmBackbone) else net
    # What timm built has this of its own; a net around another one only passes it on.
    config = vars(registered).get("pretrained_cfg") or {}
    if not timm.is_model(config.get("architecture", "")):
        raise ValueError(
            f"a {type(registered).__name__} is not registered with timm, so the hub's format has "
            "no name for it; export a program instead"
        )
    return registered


def _description(
    net: nn.Module, options: Mapping[str, Any], class_names: Sequence[str], size: int | None
) -> dict[str, Any]:
    registered = _registered(net)
    # What the adapter of a network of timm's added, then what was asked for.
    arguments = {**getattr(net, "options", {}), **options}
    arguments = {key: value for key, value in arguments.items() if key not in _NOT_OPTIONS}
    arguments["num_classes"] = registered.num_classes
    is_option = "invariant" in inspect.signature(type(registered)).parameters
    if is_option and isinstance(registered.invariant, bool | str):
        # An octic model may have changed itself to what its weights need.
        arguments["invariant"] = registered.invariant
    made = [
        key
        for key, value in arguments.items()
        if isinstance(value, Mapping) and "_target_" in value
    ]
    if made:
        raise ValueError(
            f"{made[0]} is an object that a config builds, which the hub's format cannot name; "
            "export a program instead"
        )
    description: dict[str, Any] = {"model_args": json.loads(json.dumps(arguments))}
    if class_names and len(class_names) == registered.num_classes:
        description["model_config"] = {"label_names": list(class_names)}
    # timm itself writes the registered size of a net that takes any.
    side = size or getattr(registered, "img_size", None) or arguments.get("img_size")
    if side is not None:
        description["data_config"] = {"img_size": side}
    return description
