"""Published spellings of parameter names, and ours: the file that knows them.

Ours are DINOv2's (`ls1.gamma`), with each token as one tensor of the part that is trained. Others:

    gamma_1, gamma_2                          DeiT III's layer scale; gamma_1_1 of parallel branches
    cls_token.0 .. .4 or .7, mask_token.k     octic tokens part by part; all but .0 are zero
    _orig_mod., _fsdp_wrapped_module., module., backbone.    left by wrappers, anywhere
    blocks.<chunk>.<index>.                   DINOv2's block chunks
    invariantization.{rotation,reflection}_action    constants
    dino_head.*, ibot_head.*                  heads beside a backbone
    *_sym, *_asym                             mirror nets, "Flopping for FLOPs" (`vit.mirror_keys`)

A name that the model has itself is its own, whatever else it could mean: also behind a wrapper, as
in `module.patch_embed.backbone.conv.weight` of timm's hybrid networks.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from vit.mirror_keys import PERMUTATION, STEM, mirror_name, to_slabs

HEADS = ("dino_head.", "ibot_head.")
TOKENS = ("cls_token", "register_tokens", "mask_token")
_WRAPPER = re.compile(r"(?:^|(?<=\.))(_fsdp_wrapped_module|_orig_mod|module|backbone)\.")
_CONSTANTS = re.compile(r"(^|\.)(rotation_action|reflection_action)$")
_TOKEN_PART = re.compile(rf"^({'|'.join(TOKENS)})\.(\d+)$")
_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")
_GAMMA = re.compile(r"(^|\.)gamma_([12])(_1)?(?=\.|$)")


def strip_wrappers(name: str) -> str:
    """Remove the prefixes that compilation, data parallelism and training wrappers leave."""
    return _WRAPPER.sub("", name)


def renamed(state: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """Weights under the names that `rename` gives, which it must not change any further.

    Of a weight that is given in two spellings the second stays under its own name, so that
    `check_fit` lists it.
    """
    found = {name: tensor for name, tensor in state.items() if rename(name) == name}
    for name, tensor in state.items():
        ours = rename(name)
        found[name if ours in found else ours] = tensor
    return found


def from_published(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights in any published spelling as the state dict of `model`, every key accounted for.

    Raises ValueError as `check_fit` does.
    """
    own = model.state_dict()
    found, left_over = rename_published(state, own, grid=getattr(model, "grid_size", None))
    return check_fit(found, own, type(model).__name__, also_left_over=left_over)


def check_fit(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    model_name: str,
    *,
    also_left_over: Sequence[str] = (),
) -> dict[str, Tensor]:
    """`found` in the order of `expected`, which it must match in names and shapes.

    Raises ValueError that lists what is missing, what is left over and which shapes differ.
    """
    missing = sorted(set(expected) - set(found))
    left_over = [*also_left_over, *sorted(set(found) - set(expected))]
    shapes = [
        f"{name} {tuple(found[name].shape)} in the file, {tuple(tensor.shape)} in the model"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    complaints = [
        f"{title}: {_listing(names)}"
        for title, names in (
            ("missing", missing),
            ("left over", left_over),
            ("of another shape", shapes),
        )
        if names
    ]
    if complaints:
        article = "an" if model_name[0] in "AEIOaeio" else "a"
        raise ValueError(f"the weights do not fit {article} {model_name}; " + "; ".join(complaints))
    return {name: found[name] for name in expected}


def rename_published(
    state: Mapping[str, Tensor],
    own: Collection[str] = (),
    *,
    grid: tuple[int, int] | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under our names, without what we do not store; and names given twice.

    own: the model's names. grid: its patches, for files that do not tell theirs.
    """
    found: dict[str, Tensor] = {}
    twice = []
    order, mirror = None, False
    places = {strip_wrappers(ours): ours for ours in own}
    for name, tensor in state.items():
        inner = _unwrapped(name, own)
        spelled = inner if inner in own else places.get(inner, inner)
        if spelled == PERMUTATION and spelled not in own:
            order = tensor
            continue
        mirror = mirror or (spelled == STEM and spelled not in own)
        ours = spelled if spelled in own else _our_name(spelled, tensor)
        if ours is None:
            continue
        if ours in found:
            twice.append(name)
        found[ours] = tensor
    return to_slabs(found, order, grid) if mirror else found, twice


def _unwrapped(name: str, own: Collection[str]) -> str:
    """The name behind its outer wrappers: as soon as it is the model's, else behind all of them."""
    while name not in own and (inner := _WRAPPER.sub("", name, count=1)) != name:
        name = inner
    return name


def _our_name(name: str, tensor: Tensor) -> str | None:
    """Our name of a published one; None for what we do not store."""
    if name.startswith(HEADS) or _CONSTANTS.search(name):
        return None
    part = _TOKEN_PART.match(name)
    if part:
        token, number = part.groups()
        if number == "0":
            return token
        # A stored part that is not zero would be a model that ours cannot express.
        if tensor.device.type == "meta" or not torch.any(tensor):
            return None
        return name
    name = mirror_name(_CHUNKED.sub(r"blocks.\1.", name))
    return _layer_scale_name(name, tensor)


def _layer_scale_name(name: str, tensor: Tensor) -> str:
    match = _GAMMA.search(name)
    if match is None:
        return name
    # Octic scales have further parts (gamma_1.alpha_A1), the plain one is a single tensor.
    plain = name.endswith(match.group(0))
    twin = "1" if match.group(3) else ""
    return _GAMMA.sub(rf"\g<1>ls\g<2>{twin}" + (".gamma" if plain else ""), name)


def _listing(names: list[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
