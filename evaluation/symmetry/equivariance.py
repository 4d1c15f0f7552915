"""Measure how far a net is from the law f(g x) = g f(x), for the symmetries g of the square.

For any net: whether its class token stays the same when the image is turned, and its patches turn
along, at the end and after each layer. For a net with an octic half: whether every layer of that
half obeys the law of its own group, which also mixes channels. The group (elements and matrices) is
that of the net's `group`; this module knows none.
Letters: B images, T tokens, P prefix tokens, h w grid of patches, D channels, G order of the group.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from evaluation.features.dataset import evaluating
from evaluation.features.reading import features_of, logits_in
from evaluation.progress import track
from utils.symmetry import SYMMETRIES, transform_image, transform_map
from vit.backbone import Backbone, Features

# Where ViTs keep their blocks: ours, timm's behind the adapter, torchvision's, those of DINO's kin.
BLOCKS = ("blocks", "net.blocks", "net.encoder.layers", "net.encoder.layer")
# Kinds of layers where g moves patches alone: no symmetry is built in, or channels are invariant.
MOVES_PATCHES = PLAIN, INVARIANT = "plain", "invariant"


class Group(Protocol):
    """The parts of a net's group that are used: elements, each with a `name`, and matrices."""

    elements: Iterable

    def action(self, element: object) -> object:
        """Matrix [G G] of an element."""
        ...


class OcticNet(Backbone, Protocol):
    """The attributes of a net with an octic half that are used."""

    group: Group
    switch: int


class TurnError(NamedTuple):
    """Relative distances |f(g x) - g f(x)| / |f(x)|."""

    cls: float  # of the class token, g acting trivially: 0 for an invariant net
    patches: float | None  # of the patches, g turning their map; None for a net without patches


class LayerError(NamedTuple):
    """Relative errors of one layer's tokens by element; None for elements its group lacks."""

    octic: bool  # whether the layer claims the law of the net's group
    kind: str  # how g acts: the group whose matrix mixes channels, or a word of MOVES_PATCHES
    errors: dict[str, float | None]


class Measured(NamedTuple):
    """Errors of a net under symmetries, after each layer and at the end."""

    layers: dict[str, LayerError]  # "patch_embed", "blocks.0", ...
    turns: dict[str, TurnError]  # by element


class _Pass(NamedTuple):
    stages: dict[str, Tensor]  # tokens [B T D], or maps [B h w D] of nets without token blocks
    end: Features


@torch.no_grad()
def measure(
    net: Backbone | OcticNet,
    images: Tensor,
    *,
    elements: Sequence[str] = tuple(SYMMETRIES),
    shown: bool = False,
) -> Measured:
    """Errors of any net after each layer and at the end, by element.

    `images` [B 3 H H] are square. The layers are `patch_embed` (with prefix tokens and positions)
    and `blocks.i`, before the final norm; for nets without blocks of tokens, `features.i` for all
    maps from `features`. The identity's error is 0, as the net is deterministic.
    """
    matrices = _channel_matrices(net, images.dtype)
    turns: dict[str, TurnError] = {}
    with evaluating(net) as device:
        images = images.to(device)
        still = _run(net, images)
        grid = _grid(net, images, still.end)
        octic = {name: _obeys_group(net, name) for name in still.stages}
        layers = {
            name: LayerError(octic[name], _kind(net, tokens, octic[name]), {})
            for name, tokens in still.stages.items()
        }
        for element in track(elements, total=len(elements), label="elements", shown=shown):
            turned = _run(net, transform_image(images, element))
            for name, tokens in still.stages.items():
                error = None
                if not octic[name] or element in matrices:
                    matrix = matrices[element].to(device) if octic[name] else None
                    moved = _move(tokens, element, grid, matrix)
                    error = relative_error(turned.stages[name], moved)
                layers[name].errors[element] = error
            turns[element] = _end_error(turned.end, still.end, element)
    return Measured(layers, turns)


def layer_errors(net: Backbone | OcticNet, images: Tensor) -> dict[str, dict[str, float]]:
    """Relative error of the law after each layer of the octic half: layer -> element -> error.

    The elements are those of the net's group; empty for a net without a group.
    """
    if not _is_octic(net):
        return {}
    names = [element.name for element in net.group.elements]
    return octic_only(measure(net, images, elements=names).layers)


def octic_only(layers: Mapping[str, LayerError]) -> dict[str, dict[str, float]]:
    """The layers that must obey their group's law, with its elements alone."""
    return {
        name: {element: error for element, error in layer.errors.items() if error is not None}
        for name, layer in layers.items()
        if layer.octic
    }


def worst_error(errors: Mapping[str, Mapping[str, float]]) -> float | None:
    """Largest error of `layer_errors` over layers and elements; None if there are none."""
    return greatest(error for by_element in errors.values() for error in by_element.values())


def greatest(errors: Iterable[float | None]) -> float | None:
    """The largest error; NaN if any is NaN, which max() may miss; None if there are none."""
    found = [error for error in errors if error is not None]
    return next((error for error in found if math.isnan(error)), max(found, default=None))


@torch.no_grad()
def logit_errors(net: nn.Module, images: Tensor) -> dict[str, tuple[float, float]]:
    """For each element, the relative change of logits and the share of unchanged predictions.

    The share is NaN if logits are not finite.
    """
    with evaluating(net) as device:
        images = images.to(device)
        still = logits_in(net(images))
        errors = {}
        for element in SYMMETRIES:
            turned = logits_in(net(transform_image(images, element)))
            same = (turned.argmax(dim=-1) == still.argmax(dim=-1)).double().mean()
            told = turned.isfinite().all() and still.isfinite().all()
            errors[element] = (relative_error(turned, still), float(same) if told else math.nan)
    return errors


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| over all entries."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def _is_octic(net: Backbone | OcticNet) -> TypeGuard[OcticNet]:
    return getattr(net, "group", None) is not None


def _obeys_group(net: Backbone | OcticNet, name: str) -> bool:
    if not _is_octic(net):
        return False
    return name == "patch_embed" or int(name.rpartition(".")[2]) < net.switch


def _kind(net: Backbone | OcticNet, tokens: Tensor, octic: bool) -> str:
    if not _is_octic(net):
        return PLAIN
    # Nets without blocks of tokens are read by `features`: maps of invariants if they have such.
    if tokens.ndim == 4:
        return INVARIANT if getattr(net, "invariant", False) else PLAIN
    return _group_name(net.group) if octic else PLAIN


def _group_name(group: Any) -> str:
    name = getattr(group, "name", "equivariant")
    return "octic" if name == "D4" else name


def _channel_matrices(net: Backbone | OcticNet, dtype: torch.dtype) -> dict[str, Tensor]:
    if not _is_octic(net):
        return {}
    group = net.group
    return {
        element.name: torch.as_tensor(group.action(element), dtype=dtype)
        for element in group.elements
    }


def _run(net: Backbone, images: Tensor) -> _Pass:
    """One forward pass, with the tokens after each layer."""
    stages: dict[str, Tensor] = {}
    blocks = _find_blocks(net)
    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            hooks.enter_context(_kept_output(block, f"blocks.{index}", stages))
        if blocks:
            hooks.enter_context(_kept_input(blocks[0], "patch_embed", stages))
        end = features_of(net, images)[0]
    height, width = _grid(net, images, end)
    stages = {
        name: tokens
        for name, tokens in stages.items()
        if tokens.ndim == 3 and tokens.shape[1] >= height * width
    }
    if not stages:
        # A net that does not say how many blocks it has may give its last one only.
        found = features_of(net, images, range(net.depth)) if hasattr(net, "depth") else [end]
        maps = {f"features.{index}": entry.patches for index, entry in enumerate(found)}
        stages = {name: part for name, part in maps.items() if part is not None}
    return _Pass(stages, end)


def _find_blocks(net: Any) -> list[nn.Module]:
    for path in BLOCKS:
        found = net
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList | nn.Sequential):
            return list(found)
    return []


def _kept_output(block: nn.Module, name: str, stages: dict[str, Tensor]) -> Any:
    def keep(module: nn.Module, args: Any, out: Any) -> None:
        stages[name] = out[0] if isinstance(out, tuple) else out

    return block.register_forward_hook(keep)


def _kept_input(block: nn.Module, name: str, stages: dict[str, Tensor]) -> Any:
    def keep(module: nn.Module, args: tuple) -> None:
        stages[name] = args[0]

    return block.register_forward_pre_hook(keep)


def _grid(net: Backbone, images: Tensor, end: Features) -> tuple[int, int]:
    if end.patches is not None:
        return end.patches.shape[1], end.patches.shape[2]
    return images.shape[-2] // net.patch_size, images.shape[-1] // net.patch_size


def _move(tokens: Tensor, element: str, grid: tuple[int, int], matrix: Tensor | None) -> Tensor:
    """Act on tokens [B T D] or maps [B h w D]: patches change places, channels mix by `matrix`."""
    if tokens.ndim == 4:
        return transform_map(tokens, element)
    prefix = tokens.shape[1] - grid[0] * grid[1]
    moved = transform_map(tokens[:, prefix:].unflatten(1, grid), element).flatten(1, 2)
    tokens = torch.cat([tokens[:, :prefix], moved], dim=1)
    if matrix is None:
        return tokens
    return (matrix.to(tokens.dtype) @ tokens.unflatten(-1, (len(matrix), -1))).flatten(-2)


def _end_error(turned: Features, still: Features, element: str) -> TurnError:
    patches = None
    if still.patches is not None and turned.patches is not None:
        patches = relative_error(turned.patches, transform_map(still.patches, element))
    return TurnError(relative_error(turned.cls, still.cls), patches)
