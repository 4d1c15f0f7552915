"""Any classifier as an embedding and a head: logits = head(embed(images)), exactly.

Each split gets the model as an argument and keeps no reference to it, so that a copy of the
model is split in the same place.

Letters in shapes: B images, D channels of the embedding, C classes.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn


class Split(Protocol):
    """How a model is split."""

    def embed(self, model: Any, images: Tensor) -> Tensor:
        """The head's input [B D]."""
        ...

    def head(self, model: Any, z: Tensor) -> Tensor:
        """Logits [B C] of embeddings [B D]."""
        ...

    def parts(self, model: Any) -> list[nn.Module]:
        """The modules of the head."""
        ...


class Pair(nn.Module):
    """Two callables as one classifier: head(embed(images))."""

    def __init__(self, embed: Callable[..., Tensor], head: Callable[..., Tensor]) -> None:
        super().__init__()
        self.embed, self.head = embed, head

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B C]."""
        return self.head(self.embed(images))


class PairSplit:
    """A `Pair`."""

    def embed(self, model: Any, images: Tensor) -> Tensor:
        """The head's input [B D]."""
        return model.embed(images)

    def head(self, model: Any, z: Tensor) -> Tensor:
        """Logits [B C]."""
        return model.head(z)

    def parts(self, model: Any) -> list[nn.Module]:
        """The modules of the head."""
        return [model.head] if isinstance(model.head, nn.Module) else []


class TimmSplit:
    """timm's interface, ours too: forward_head(forward_features(x), pre_logits=True), then head.

    Distilled nets have two heads, whose logits are averaged; where each has a token of its own
    (DeiT), the embedding holds both tokens, one after the other.
    """

    def __init__(self, *, two_tokens: bool) -> None:
        self.two_tokens = two_tokens

    def embed(self, model: Any, images: Tensor) -> Tensor:
        """The head's input [B D], [B 2D] of two tokens."""
        net = _inner(model)
        found = net.forward_features(images)
        if self.two_tokens:
            return found[:, :2].flatten(1)
        return net.forward_head(found, pre_logits=True)

    def head(self, model: Any, z: Tensor) -> Tensor:
        """Logits [B C]."""
        classifier = _inner(model).get_classifier()
        if not isinstance(classifier, tuple | list):
            return classifier(z)
        tokens = z.chunk(2, dim=-1) if self.two_tokens else (z, z)
        first, second = (head(part) for head, part in zip(classifier, tokens, strict=True))
        return (first + second) / 2

    def parts(self, model: Any) -> list[nn.Module]:
        """The modules of the head."""
        classifier = _inner(model).get_classifier()
        return list(classifier) if isinstance(classifier, tuple | list) else [classifier]


class GroupMapSplit:
    """GE-ViT's interface: the largest logit over the group of a map that is summed over pixels.

    The embedding is that sum, all elements side by side.
    """

    def embed(self, model: Any, images: Tensor) -> Tensor:
        """The head's input [B D*G]."""
        return _inner(model).forward_features(images).sum(dim=(-2, -1)).flatten(1)

    def head(self, model: Any, z: Tensor) -> Tensor:
        """Logits [B C]."""
        classifier = _inner(model).get_classifier()
        maps = z.unflatten(1, (classifier.in_channels, -1))[..., None, None]
        return classifier(maps).flatten(2).amax(dim=2)

    def parts(self, model: Any) -> list[nn.Module]:
        """The modules of the head."""
        return [_inner(model).get_classifier()]


class PublishedSplit:
    """The published interface: forward(x, output_cls=True) and `mlp_head`."""

    def embed(self, model: Any, images: Tensor) -> Tensor:
        """The head's input [B D]."""
        return model(images, output_cls=True)

    def head(self, model: Any, z: Tensor) -> Tensor:
        """Logits [B C]."""
        return model.mlp_head(z)

    def parts(self, model: Any) -> list[nn.Module]:
        """The modules of the head."""
        return [model.mlp_head]


class FeatureSplit:
    """A Backbone without a classifier: its class token is embedding and output."""

    def embed(self, model: Any, images: Tensor) -> Tensor:
        """The class token [B D]."""
        return model.features(images)[0].cls

    def head(self, model: Any, z: Tensor) -> Tensor:
        """The embedding itself."""
        return z

    def parts(self, model: Any) -> list[nn.Module]:
        """None."""
        return []


class LastLinearSplit:
    """Any other net, such as torchvision's: split before its last linear layer.

    A hook reads the embedding at the input of that layer, so a pass also computes its product.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def embed(self, model: Any, images: Tensor) -> Tensor:
        """The head's input [B D]."""
        caught: list[tuple[Tensor, Tensor]] = []

        def catch(module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
            caught.append((args[0], logits))

        handle = model.get_submodule(self.path).register_forward_hook(catch)
        try:
            found = model(images)
        finally:
            handle.remove()
        # Nets with auxiliary heads give a tuple while they train.
        found = found[0] if isinstance(found, tuple) else found
        if not caught or caught[-1][1] is not found:
            raise ValueError(
                f"{type(model).__name__} does not end in its layer {self.path}; give (embed, "
                "head), two callables with logits = head(embed(images))"
            )
        return caught[-1][0]

    def head(self, model: Any, z: Tensor) -> Tensor:
        """Logits [B C]."""
        return model.get_submodule(self.path)(z)

    def parts(self, model: Any) -> list[nn.Module]:
        """The modules of the head."""
        return [model.get_submodule(self.path)]


def find_split(model: nn.Module) -> Split:
    """How to split a model; ValueError, which says what to give instead, if it cannot be split."""
    net = _inner(model)
    if isinstance(model, Pair):
        return PairSplit()
    if all(hasattr(net, name) for name in ("forward_features", "forward_head", "get_classifier")):
        if isinstance(net.get_classifier(), nn.Conv3d):
            return GroupMapSplit()
        return TimmSplit(two_tokens=hasattr(net, "dist_token") and hasattr(net, "head_dist"))
    if hasattr(model, "mlp_head") and _takes(model.forward, "output_cls"):
        return PublishedSplit()
    path = _named_classifier(model)
    if path is None and inspect.ismethod(getattr(model, "features", None)):
        return FeatureSplit()
    path = path or _last_linear(model)
    if path is not None:
        return LastLinearSplit(path)
    raise ValueError(
        f"{type(model).__name__} does not end in a linear layer; give (embed, head), two callables "
        "with logits = head(embed(images))"
    )


def head_width(split: Split, model: nn.Module) -> int | None:
    """Channels of the embedding that a head takes; None where its modules do not say."""
    widths = []
    if isinstance(split, GroupMapSplit):
        net = _inner(model)
        return split.parts(model)[0].in_channels * net.plane_group.order
    for module in (module for part in split.parts(model) for module in part.modules()):
        if isinstance(module, nn.Linear):
            widths.append(module.in_features)
        elif isinstance(module, nn.LayerNorm):
            widths.append(module.normalized_shape[0])
    if not widths:
        return None
    return widths[0] * (2 if getattr(split, "two_tokens", False) else 1)


def head_classes(split: Split, model: nn.Module) -> int | None:
    """Logits that a head gives; None where its modules do not say."""
    linear = [m for p in split.parts(model) for m in p.modules() if isinstance(m, nn.Linear)]
    return linear[-1].out_features if linear else None


def _inner(model: Any) -> Any:
    """The net in an adapter of the Backbone contract, where it has timm's interface itself."""
    net = getattr(model, "net", None)
    return net if hasattr(net, "forward_head") and not hasattr(model, "forward_head") else model


def _named_classifier(model: nn.Module) -> str | None:
    """Path of the classifier that an adapted net names as timm's do."""
    config = getattr(getattr(model, "net", None), "pretrained_cfg", None) or {}
    name = config.get("classifier") if isinstance(config, dict) else None
    return f"net.{name}" if isinstance(name, str) and name else None


def _last_linear(model: nn.Module) -> str | None:
    """Path of the linear layer a net ends in: the last child of the last child, and so on."""
    path: list[str] = []
    module = model
    while not isinstance(module, nn.Linear):
        children = list(_children(module))
        if not children:
            return None
        name, module = children[-1]
        path.append(name)
    return ".".join(path)


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # Dropout and activations after the head do not count as the end.
    passive = (nn.Dropout, nn.Identity, nn.Softmax, nn.LogSoftmax)
    for name, child in module.named_children():
        if not isinstance(child, passive):
            yield name, child


def _takes(function: Callable[..., Any], keyword: str) -> bool:
    return keyword in inspect.signature(function).parameters
