"""The one contract between networks and everything that trains or judges them.

Letters in shapes: B images, N patches, h w their grid, R registers, T all tokens, D channels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Features(NamedTuple):
    """Normalised output of one block: what every probe reads."""

    cls: Tensor  # [B D]; a network without a class token gives its pooled patches
    patches: Tensor | None  # [B h w D]; None when the network drops tokens


class Encoded(NamedTuple):
    """All tokens of the last block, by their kind: what self-supervised recipes read."""

    cls: Tensor  # [B D] after the final norm
    registers: Tensor  # [B R D] after the final norm
    patches: Tensor  # [B N D] after the final norm, rows of the grid one after the other
    prenorm: Tensor  # [B T D] before the final norm


@runtime_checkable
class Backbone(Protocol):
    """A network that turns images into features."""

    embed_dim: int
    patch_size: int

    def features(self, images: Tensor, layers: Sequence[int] = (-1,)) -> list[Features]:
        """Normalised features of the asked blocks; negative indices count from the end."""
        ...


def take_indices(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    """Block indices in [0, depth): None all, n the last n, a list as given (negatives allowed)."""
    if indices is None:
        return list(range(depth))
    asked = list(range(depth - indices, depth)) if isinstance(indices, int) else list(indices)
    taken = [index + depth if index < 0 else index for index in asked]
    too_many = isinstance(indices, int) and indices > depth  # some blocks would be taken twice
    if too_many or not taken or any(not 0 <= index < depth for index in taken):
        raise ValueError(f"blocks {indices} asked of a network with blocks 0 to {depth - 1}")
    return taken


def features_of_intermediates(
    net: Any, images: Tensor, indices: Sequence[int], **options: bool
) -> list[Features]:
    """Features of blocks in [0, depth) by timm's `forward_intermediates`, given `options`.

    Where it gives no class token, that is the mean of the map.
    """
    blocks = sorted(set(indices))  # timm gives each block once, ascending
    entries = net.forward_intermediates(images, indices=blocks, intermediates_only=True, **options)
    found = {}
    for block, entry in zip(blocks, entries, strict=True):
        maps, prefix = entry if isinstance(entry, tuple) else (entry, None)
        pooled = prefix is None or not getattr(net, "has_class_token", True)
        cls = maps.mean(dim=(2, 3)) if pooled else prefix[:, 0]
        found[block] = Features(cls=cls, patches=maps.permute(0, 2, 3, 1))
    return [found[index] for index in indices]


def device_of(net: Backbone | nn.Module) -> torch.device:
    """Device of the first parameter; the CPU for a net without any."""
    parameters = net.parameters() if isinstance(net, nn.Module) else ()
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


@contextmanager
def eval_mode(net: nn.Module) -> Iterator[None]:
    """Put a network into eval mode, and every part back into its own mode afterwards."""
    modes = [(part, part.training) for part in net.modules()]
    net.eval()
    try:
        yield
    finally:
        net.train(modes[0][1])  # a module may do more than set the flag, such as unmerge weights
        for part, mode in modes:
            part.training = mode


def is_exporting() -> bool:
    """Whether `torch.export` traces the call."""
    # Not torch.compiler.is_exporting(): Dynamo of torch 2.11 folds it to True in any compilation.
    return torch.compiler._is_exporting_flag


def check_counts(least: int, /, **counts: int) -> None:
    """ValueError unless each is a whole number from `least` on."""
    for key, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{key} must be a whole number of at least {least}, not {value!r}")


def sides_of(img_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of an `img_size`, one side or both; ValueError for anything else."""
    sides = tuple(img_size) if isinstance(img_size, tuple | list) else (img_size, img_size)
    if len(sides) != 2:
        raise ValueError(f"img_size must be one side or (height, width), not {img_size}")
    for side in sides:
        check_counts(1, img_size=side)
    return sides


def check_whole_patches(
    size: tuple[int, int], patch_size: int | tuple[int, int], what: str = "image size"
) -> None:
    """ValueError, naming the nearest sizes, unless whole patches fill images of (height, width)."""
    sides = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    pairs = list(zip(size, sides, strict=True))
    if all(side >= patch and side % patch == 0 for side, patch in pairs):
        return
    below = [max(side // patch, 1) * patch for side, patch in pairs]
    above = [max(-(-side // patch), 1) * patch for side, patch in pairs]
    near = list(dict.fromkeys(f"{height} x {width}" for height, width in (below, above)))
    patch = sides[0] if sides[0] == sides[1] else f"{sides[0]} x {sides[1]}"
    raise ValueError(
        f"{what} {size[0]} x {size[1]} is not a multiple of the patch size {patch}; "
        f"{' and '.join(near)} {'is' if len(near) == 1 else 'are'}"
    )


def check_pool(name: str, known: Sequence[str] = ("avg", "")) -> str:
    """The name of a pooling (timm's `global_pool`; "" is none); ValueError for an unknown one."""
    if name not in known:
        pools = ", ".join(repr(pool) for pool in known)
        raise ValueError(f"unknown global_pool {name!r}; known: {pools}")
    return name


def channels_of(net: Any, asked: int = 3) -> int:
    """Channels of the images: the net's own word, else its first convolution's, else `asked`."""
    if isinstance(own := getattr(net, "in_chans", None), int):
        return own
    first = dict(net.named_modules()).get(first_conv_of(net))
    return int(getattr(first, "in_channels", None) or asked)


def first_conv_of(model: nn.Module) -> str:
    """Name of the convolution that reads the images; of a lift's, the one that stands for all."""
    config = getattr(model, "pretrained_cfg", None) or {}
    name: Any = config.get("first_conv") or "patch_embed.proj"
    return name if isinstance(name, str) else name[0]
