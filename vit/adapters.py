"""Other people's networks as a Backbone."""

import difflib
import importlib
import inspect
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_model_config_from_hf
from torch import Tensor, nn

from vit.backbone import Features, channels_of, features_of_intermediates, take_indices


class NotRegistered(ValueError):
    """timm knows no model `unregistered` here, as long as what registers it is not imported."""

    def __init__(self, name: str, hint: str) -> None:
        super().__init__(f"timm has no model {name!r}{hint}")
        self.unregistered = name


class TimmBackbone(nn.Module):
    """Any timm network with `forward_intermediates`: ViTs, and CNNs by their pooled map.

    A name "local-dir:FOLDER" or "hf-hub:user/name" means a network in the hub's format with its
    weights (`vit.hub`). NotRegistered, a ValueError, for a model that timm does not know here.
    """

    def __init__(self, model_name: str, *, pretrained: bool = False, **kwargs: Any) -> None:
        super().__init__()
        source = model_name.partition(":")[0] if ":" in model_name else ""
        architecture = _architecture(model_name) if source else model_name
        if not timm.is_model(architecture):
            registered = "; a package that registers it must be imported first"
            raise NotRegistered(architecture, registered if source else _near(architecture))
        self.options = {**_dynamic(architecture), **kwargs}
        if source:
            self.net = _from_hub(model_name, self.options)
        else:
            self.options = {"num_classes": 0, **self.options}
            self.net = _from_timm(model_name, pretrained, self.options)
        if not hasattr(self.net, "forward_intermediates"):
            raise ValueError(f"timm's {model_name} has no forward_intermediates")
        last = self.net.feature_info[-1]
        # What counts is what comes with `norm`: a neck's width (SAM), never that of a CNN's head.
        self.embed_dim = self.net.num_features if hasattr(self.net, "neck") else last["num_chs"]
        self.patch_size = last["reduction"]
        self.depth = len(self.net.feature_info)
        self.in_chans = channels_of(self.net, self.options.get("in_chans", 3))
        self._wanted = _intermediates_options(self.net)

    def forward(self, images: Tensor) -> Tensor:
        """The network's own output. ValueError for images of other channels."""
        self._check_channels(images)
        return self.net(images)

    def features(self, images: Tensor, layers: Sequence[int] = (-1,)) -> list[Features]:
        """Normalised features of the asked blocks; a CNN's class token is its mean feature.

        ValueError for images of other channels.
        """
        self._check_channels(images)
        indices = take_indices(layers, self.depth)
        return features_of_intermediates(self.net, images, indices, **self._wanted)

    def _check_channels(self, images: Tensor) -> None:
        if images.shape[1] != self.in_chans:
            raise ValueError(
                f"images of shape {tuple(images.shape)} for a model of {self.in_chans} channels"
            )


def _architecture(model_name: str) -> str:
    """The registered name of a network in the hub's format; ValueError where there is none."""
    source, _, where = model_name.partition(":")
    if source not in ("local-dir", "hf-hub"):
        raise ValueError(
            f"unknown source in {model_name!r}; known: local-dir:FOLDER, hf-hub:user/name"
        )
    if source == "hf-hub":
        architecture = load_model_config_from_hf(where)[1]
    else:
        architecture = _described(Path(where) / "config.json")
    is_registered(architecture)  # imports what registers it
    return architecture


def is_registered(name: str) -> bool:
    """Whether timm knows a model of that name, once ours have joined its own."""
    if not timm.is_model(name):
        # One wheel carries vit and octic; whose models timm knows once it is imported.
        with suppress(ImportError):
            importlib.import_module("octic")
    return timm.is_model(name)


def _near(name: str) -> str:
    name = name.split(".")[0]  # without the tag of its weights
    known = timm.list_models(f"{name.split('_')[0]}_*") or timm.list_models()
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _described(file: Path) -> str:
    """The architecture that a config.json names."""
    if not file.is_file():
        raise ValueError(
            f"{file.parent} holds no config.json, so it is no network in the hub's format"
        )
    try:
        return str(json.loads(file.read_text())["architecture"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} names no architecture") from None


def _from_hub(model_name: str, options: dict[str, Any]) -> nn.Module:
    """The network of a folder or repository; its head stays where `num_classes` is its own or None.

    By default the head is left out.
    """
    options = dict(options)
    num_classes = options.pop("num_classes", 0)
    net = timm.create_model(model_name, pretrained=True, **options)
    if num_classes not in (0, None, net.num_classes):
        raise ValueError(f"{model_name} tells {net.num_classes} classes apart, not {num_classes}")
    if num_classes == 0 and net.num_classes:
        net.reset_classifier(0)
    return net


def _from_timm(model_name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """A network of timm; ValueError where its weights are wanted and cannot be downloaded."""
    try:
        return timm.create_model(model_name, pretrained=pretrained, **options)
    except OSError as error:  # of the hub and of other servers alike
        if not pretrained:
            raise
        reason: BaseException = error
        while reason.__cause__:  # the hub's own words are of files that are not found
            reason = reason.__cause__
        raise ValueError(
            f"the weights of {model_name} cannot be downloaded ({reason}); give a file of them "
            "instead (--weights; in training --finetune, --teacher-path)"
        ) from None


def _intermediates_options(net: Any) -> dict[str, bool]:
    """Keywords of `forward_intermediates`, so that it gives prefix tokens and normalises."""
    known = inspect.signature(net.forward_intermediates).parameters
    prefix = bool(getattr(net, "num_prefix_tokens", 0)) and "return_prefix_tokens" in known
    options = {"return_prefix_tokens": True} if prefix else {}
    # Nets without a norm of their own behind the blocks (Hiera) refuse to be asked.
    if hasattr(net, "blocks") and (hasattr(net, "norm") or hasattr(net, "neck")):
        options["norm"] = True
    return options


def _dynamic(model_name: str) -> dict[str, Any]:
    """`dynamic_img_size` for timm's ViTs that have it; those with relative positions do not."""
    if not model_name.startswith(("vit_", "deit")):
        return {}
    with torch.device("meta"):
        known = hasattr(timm.create_model(model_name), "dynamic_img_size")
    return {"dynamic_img_size": True} if known else {}


def timm_backbone(model_name: str, **kwargs: Any) -> TimmBackbone:
    """Build timm's `model_name` as a Backbone (config target)."""
    return TimmBackbone(model_name, **kwargs)
