"""How far a net is from the law f(g x) = g f(x), for the symmetries g of the square.

Two questions. Of any Backbone: does its class token stay when the image is turned, and do its
patches turn along? Of a net with an octic half: does every layer of that half obey the law of its
own group? The latter reads the net's `group` (elements and matrices); no group is known here.
Letters: B images, T tokens, P prefix tokens, h w grid of patches, D channels, G order of the group.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from evaluation.features import evaluating
from utils.symmetry import SYMMETRIES, transform_image, transform_map
from vit.backbone import Backbone


class Group(Protocol):
    """What is read of a net's group: elements, each with a `name`, and how they mix channels."""

    elements: Iterable

    def action(self, element: object) -> object:
        """Matrix [G G] of an element."""
        ...


class OcticNet(Backbone, Protocol):
    """What is read of a net with an octic half."""

    group: Group
    switch: int
    num_prefix_tokens: int
    blocks: Sequence

    def embed(self, images: Tensor) -> Tensor:
        """Tokens [B T D] of images."""
        ...


class TurnError(NamedTuple):
    """Relative distances |f(g x) - g f(x)| / |f(x)|."""

    cls: float  # of the class token, g acting trivially: 0 for an invariant net
    patches: float | None  # of the patches, g turning their map; None for a net without patches


@torch.no_grad()
def turn_errors(
    net: Backbone, images: Tensor, *, elements: Sequence[str] = tuple(SYMMETRIES)
) -> dict[str, TurnError]:
    """Invariance of the class token and equivariance of the patches of any net, by element.

    `images` [B 3 H H] are square. The entry of the identity is 0: the net is deterministic.
    """
    with evaluating(net) as device:
        images = images.to(device)
        still = net.features(images)[0]
        errors = {}
        for element in elements:
            turned = net.features(transform_image(images, element))[0]
            patches = None
            if still.patches is not None and turned.patches is not None:
                patches = relative_error(turned.patches, transform_map(still.patches, element))
            errors[element] = TurnError(relative_error(turned.cls, still.cls), patches)
    return errors


@torch.no_grad()
def layer_errors(net: Backbone | OcticNet, images: Tensor) -> dict[str, dict[str, float]]:
    """Error of the law after each layer of the octic half: layer -> element -> relative error.

    Empty for a net without a group. The layers are `patch_embed` (with tokens and positions) and
    `blocks.i` for every block before the switch to plain layers.
    """
    if not _is_octic(net):
        return {}
    group = net.group
    with evaluating(net) as device:
        images = images.to(device)
        still = _octic_tokens(net, images)
        grid = (images.shape[-2] // net.patch_size, images.shape[-1] // net.patch_size)
        errors: dict[str, dict[str, float]] = {name: {} for name in still}
        for element in group.elements:
            turned = _octic_tokens(net, transform_image(images, element.name))
            matrix = torch.as_tensor(group.action(element), dtype=images.dtype, device=device)
            for name, tokens in still.items():
                moved = _move_tokens(tokens, element.name, matrix, grid, net.num_prefix_tokens)
                errors[name][element.name] = relative_error(turned[name], moved)
    return errors


def worst_error(errors: dict[str, dict[str, float]]) -> float | None:
    """Largest error of `layer_errors` over layers and elements; None where there are none."""
    return max((max(by_element.values()) for by_element in errors.values()), default=None)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| over all entries."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def _is_octic(net: Backbone | OcticNet) -> TypeGuard[OcticNet]:
    return getattr(net, "group", None) is not None


def _octic_tokens(net: OcticNet, images: Tensor) -> dict[str, Tensor]:
    tokens = net.embed(images)
    stages = {"patch_embed": tokens}
    for index, block in enumerate(net.blocks[: net.switch]):
        tokens = block(tokens)
        stages[f"blocks.{index}"] = tokens
    return stages


def _move_tokens(
    tokens: Tensor, element: str, matrix: Tensor, grid: tuple[int, int], num_prefix_tokens: int
) -> Tensor:
    """Act on tokens [B T D]: patches change places, the channels of all tokens mix by `matrix`."""
    prefix, patches = tokens[:, :num_prefix_tokens], tokens[:, num_prefix_tokens:]
    moved = transform_map(patches.unflatten(1, grid), element).flatten(1, 2)
    tokens = torch.cat([prefix, moved], dim=1)
    return (matrix.to(tokens.dtype) @ tokens.unflatten(-1, (len(matrix), -1))).flatten(-2)
