"""Features and logits as a net gives them; one of the user's own may give anything else."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from utils.errors import UserError
from vit.backbone import Backbone, Features


def features_of(
    net: Backbone, images: Tensor, layers: Sequence[int] | None = None
) -> list[Features]:
    """Features of the asked blocks, by default of the last, for which a net needs no `layers`.

    UserError for a net that has fewer blocks, or that returns anything else.
    """
    asked, name = [-1] if layers is None else list(layers), type(net).__name__
    try:
        found = net.features(images) if layers is None else net.features(images, layers)
    except IndexError as error:
        if asked == [-1]:
            raise
        raise UserError(
            f"{name}.features, asked for blocks {asked}: {error}; a net with fewer blocks needs a "
            "probe that asks for fewer, such as probes.linear.n_last_blocks=[1]"
        ) from error
    parts = list(found) if isinstance(found, list | tuple) else []
    named = all(hasattr(part, field) for part in parts for field in Features._fields)
    if len(parts) != len(asked) or not named:
        told = ", ".join(type(part).__name__ for part in parts) or type(found).__name__
        raise UserError(
            f"{name}.features returned {told} for blocks {asked}; it must return a list of as many "
            "vit.backbone.Features(cls=[B D], patches=[B h w D] or None)"
        )
    return [Features(part.cls, part.patches) for part in parts]


def patch_map(net: Backbone, images: Tensor) -> Tensor:
    """Patches [B h w D] of the last block after the final norm, h and w of any size.

    A net that crops gives a map of the middle of its images. UserError for a net without a map.
    """
    patches = features_of(net, images)[0].patches
    if patches is None:
        raise UserError(
            f"{type(net).__name__} gives no patch tokens (features(...)[0].patches is None), which "
            "this needs"
        )
    if patches.ndim != 4 or len(patches) != len(images):
        raise UserError(
            f"{type(net).__name__} gives patches of shape {list(patches.shape)} for "
            f"{len(images)} images, not [images, rows, columns, channels]"
        )
    return patches


def patch_tokens(net: Backbone, images: Tensor) -> Tensor:
    """The map [B h w D] of a net whose patches cover the whole image; UserError for another shape.

    UserError too for a net without patches.
    """
    patches = patch_map(net, images)
    height, width = images.shape[-2:]
    expected = (len(images), height // net.patch_size, width // net.patch_size, net.embed_dim)
    if tuple(patches.shape) != expected:
        raise UserError(
            f"{type(net).__name__} gives patches of shape {list(patches.shape)} for images of "
            f"{height} x {width} pixels, not {list(expected)}"
        )
    return patches


def logits_in(found: Any) -> Tensor:
    """What a net returned for images, if it is logits [B classes]; UserError otherwise."""
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise UserError("the net gives no logits [images, classes]: it is no classifier")
    return found
