"""Weights of one network for another one: of other image size, with other classes or none.

Each adaptation is reported in one line; every other key must fit, as in `vit.weights`.

Letters in shapes: n tokens with a position, h w a grid, D channels, C classes.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from vit.backbone import channels_of, first_conv_of
from vit.keys import check_fit, rename_published
from vit.vision_transformer import resample_grid
from vit.weights import adapted_to, naming_file, read_state

POSITIONS = "pos_embed"
# Of self-supervised training; a classifier has no use for it.
UNUSED = "mask_token"
DISTILLED = "head_dist."
# Tokens before the patches; a file has positions for none of them, the first alone, or all.
PREFIXES = ("cls_token", "reg_token", "dist_token")


class Change(NamedTuple):
    """What was adapted: `head`, `mask_token`, `positions` or `channels`, and how, in words."""

    part: str
    words: str


def load_adapted(model: nn.Module, path: str | Path) -> list[str]:
    """Load a file into `model` or the network in its adapter; returns what was adapted, in words.

    Raises ValueError naming the file and the keys that do not fit.
    """
    net = getattr(model, "net", model)
    read = read_state(path)
    # An adapter's own name for the network it wraps: only our exports have it.
    read = {name.removeprefix("net."): tensor for name, tensor in read.items()}
    with naming_file(path):
        state, changes = adapt_state(read, net)
    net.load_state_dict(state, strict=True)
    return [change.words for change in changes]


def adapt_state(
    state: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, Tensor], list[Change]]:
    """Weights in any published spelling as a state dict of `model`, and what was changed.

    Position embeddings are resampled to the model's grid, and the first filters are summed or
    repeated over other image channels. A head for another number of classes, or none, is replaced
    by the model's own, freshly drawn one. Positions of class token and registers are added to these
    tokens where the model has no place for them. Raises ValueError for all else that does not fit.
    """
    if hasattr(model, "rename_state"):
        state = model.rename_state(state)
    with adapted_to(state, model):
        own = model.state_dict()
        found, twice = rename_published(state, own, grid=getattr(model, "grid_size", None))
        words = {
            "head": _adapt_head(found, own, head_of(model)),
            "mask_token": _adapt_unused(found, own),
            "positions": _adapt_positions(found, own, model),
            "channels": _adapt_channels(found, own, model),
        }
        changes = [Change(part, line) for part, lines in words.items() for line in lines]
        return check_fit(found, own, type(model).__name__, also_left_over=twice), changes


def head_of(model: nn.Module) -> str:
    """Name of the classifier of one of our models or of timm's, such as `head` or `head.fc`."""
    config = getattr(model, "pretrained_cfg", None) or {}
    name: Any = config.get("classifier", "head") or "head"
    return name if isinstance(name, str) else name[0]


def _adapt_head(found: dict[str, Tensor], own: Mapping[str, Tensor], head: str) -> list[str]:
    ours, theirs = _heads_of(own, head), _heads_of(found, head)
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    if shapes == {name: tensor.shape for name, tensor in theirs.items()}:
        return []
    weight = f"{head}.weight"
    # A head on features of another width is another network's, which the check is to say.
    if {weight} <= ours.keys() & theirs.keys() and ours[weight].shape[1] != theirs[weight].shape[1]:
        return []
    for name in theirs:
        if name not in ours or theirs[name].shape != ours[name].shape:
            del found[name]
    fresh = [name for name in ours if name not in found]
    found |= {name: ours[name] for name in fresh}
    count = len(theirs[weight]) if weight in theirs else "no"
    if not ours:
        return [f"{head}: {count} classes in the file, dropped: the model has no classifier"]
    if not fresh:
        return [f"{DISTILLED[:-1]}: dropped, the model has one classifier"]
    return [f"{head}: {count} classes in the file, {len(ours[weight])} here; it starts afresh"]


def _heads_of(state: Mapping[str, Tensor], head: str) -> dict[str, Tensor]:
    """Weights of the classifier, and of the one that speaks for a distillation token."""
    names = (f"{head}.weight", f"{head}.bias")
    return {n: tensor for n, tensor in state.items() if n in names or n.startswith(DISTILLED)}


def _adapt_unused(found: dict[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    if UNUSED in found and UNUSED not in own:
        del found[UNUSED]
        return [f"{UNUSED}: dropped, the model hides no patches"]
    if UNUSED in own and UNUSED not in found:
        found[UNUSED] = own[UNUSED]
        return [f"{UNUSED}: not in the file, starts afresh"]
    return []


def _adapt_channels(
    found: dict[str, Tensor], own: Mapping[str, Tensor], model: nn.Module
) -> list[str]:
    """Filters [out in p p] for another number of image channels, by timm's `adapt_input_conv`.

    A lift has several, all beside the one that timm knows. What symmetries move are pixels, not
    channels, so the filters stay symmetric.
    """
    first, channels = first_conv_of(model), channels_of(model)
    place = first.rpartition(".")[0] or first
    notes = []
    for name in (name for name in own if name in found and name.startswith(f"{place}.")):
        theirs, ours = found[name], own[name]
        old, new = (tensor.shape[1] if tensor.ndim == 4 else 0 for tensor in (theirs, ours))
        if not old or new != channels or old == new or theirs[:, 0].shape != ours[:, 0].shape:
            continue
        found[name] = adapt_input_conv(new, theirs, base_chans=old)
        how = "summed" if new == 1 else "repeated and scaled"
        notes = [f"{place}: {old} channels in the file, {new} here; its filters are {how}"]
    return notes


def _adapt_positions(
    found: dict[str, Tensor], own: Mapping[str, Tensor], model: nn.Module
) -> list[str]:
    slabs = [name for name in own if name.startswith(f"{POSITIONS}.")]
    if slabs:
        return _adapt_slabs(found, own, model, slabs)
    theirs, ours = found.get(POSITIONS), own.get(POSITIONS)
    if theirs is None or ours is None or theirs.ndim != 3 or theirs.shape[-1] != ours.shape[-1]:
        return []
    if theirs.shape == ours.shape:
        return []
    grid = _grid_of(model)
    before = [found[n].shape[1] for n in PREFIXES if n in found and found[n].ndim == 3]
    old, extra = _old_grid(theirs.shape[1], grid, (0, *before[:1], sum(before)))
    wanted = ours.shape[1] - grid[0] * grid[1]
    first, notes = theirs[:, :extra], []
    patches = theirs[:, extra:]
    if old != grid:
        patches = resample_grid(patches.unflatten(1, old), grid).flatten(1, 2)  # bicubic, as DeiT's
        notes.append(
            f"{POSITIONS}: resampled from {old[0]} x {old[1]} to {grid[0]} x {grid[1]} patches"
        )
    if extra and not wanted:
        notes += _add_to_tokens(found, first)
    elif wanted and not extra:
        first = torch.zeros_like(theirs[:, :wanted])
        notes.append(f"{POSITIONS}: the file has none of the class token, it starts at zero")
    found[POSITIONS] = torch.cat([first[:, :wanted], patches], dim=1)
    return notes


def _add_to_tokens(found: dict[str, Tensor], first: Tensor) -> list[str]:
    """Give positions [1 n D] to the prefix tokens themselves, in the order of both."""
    notes, start = [], 0
    for name in (name for name in PREFIXES if name in found):
        positions = first[:, start : start + found[name].shape[1]]
        start += found[name].shape[1]
        if positions.shape[1]:
            found[name] = found[name] + positions
            called = "the class token" if name == "cls_token" else name
            notes.append(f"{POSITIONS}: that of {called} is added to {called} itself")
    return notes


def _adapt_slabs(
    found: dict[str, Tensor], own: Mapping[str, Tensor], model: Any, slabs: list[str]
) -> list[str]:
    """The trained parts of symmetric positions, which the model itself knows how to resize."""
    if any(name not in found or found[name].ndim != own[name].ndim for name in slabs):
        return []
    old, new = found[slabs[0]].shape, own[slabs[0]].shape
    if old == new or old[-1] != new[-1]:
        return []
    found |= model.resize_positions({name: found[name] for name in slabs})
    height, width = (
        side * whole // part for side, whole, part in zip(old, model.grid_size, new, strict=False)
    )
    grid = " x ".join(map(str, model.grid_size))
    return [f"{POSITIONS}: resampled from {height} x {width} to {grid} patches, symmetries kept"]


def _grid_of(model: nn.Module) -> tuple[int, int]:
    grid = getattr(model, "grid_size", None)
    if grid is None:
        grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None:
        raise ValueError(f"{type(model).__name__} does not say its grid of patches")
    return grid[0], grid[1]


def _old_grid(
    count: int, own: tuple[int, int], extras: Collection[int]
) -> tuple[tuple[int, int], int]:
    """The grid of a file's `count` positions, and how many are not patches': one of `extras`.

    The model's own grid, if it has as many cells; else a square.
    """
    extra = count - own[0] * own[1]
    if extra in extras:
        return own, extra
    for extra in extras:
        side = math.isqrt(max(count - extra, 0))
        if side and side * side == count - extra:
            return (side, side), extra
    raise ValueError(
        f"{POSITIONS} of the file has {count} positions, which is no square grid of patches"
    )
