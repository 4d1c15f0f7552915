"""Published spellings of the parameters of "Flopping for FLOPs", and ours.

Ours are those of `octic` for its layers, A1 the even and A2 the odd part. Our own files are not
changed. From a published file these are left out, by name:

    left_idx, right_idx, permutation    token orders, stored as integer parameters
    zero_center                         the antisymmetric filters' centre columns: zeros
    beta_sym, beta_asym of ResMLP       shifts that the published code stores and never adds: our
                                        shifts are loaded as zeros
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vit.keys import renamed, strip_wrappers

_ORDERS = (".left_idx", ".right_idx", ".permutation")
_PARTS = {"sym": "A1", "asym": "A2"}
_WORDS = {"lin": "lin", "linear": "lin", "alpha": "alpha", "proj": "conv"}
_PART = re.compile(rf"(^|\.)({'|'.join(_WORDS)})_(a?sym)(?=\.|$)")
_POINTWISE = re.compile(r"(^|\.)lin_A[12]\.weight$")
_DENSE = re.compile(r"\.mlp\.fc[12]\.weight$|^entries\.\d+\.1\.linear\.weight$")
_SHIFT = re.compile(r"(^|\.)beta_(a?sym)$")


def mirror_resmlp_names(
    state: Mapping[str, Tensor], *, affine_bias: bool = True
) -> dict[str, Tensor]:
    """Weights of a mirror-equivariant ResMLP, published or ours, under our names."""

    def rename(name: str) -> str:
        return re.sub(r"^patch_embed\.", "stem.", _scales(name))

    found = {
        name: torch.zeros_like(tensor) if _SHIFT.search(name) else _as_timm(name, tensor)
        for name, tensor in _mirror_names(state, rename).items()
        if affine_bias or not _SHIFT.search(name)
    }
    return renamed(found, lambda name: _SHIFT.sub(lambda m: f"{m[1]}shift_{_PARTS[m[2]]}", name))


def mirror_convnext_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a mirror-equivariant ConvNeXt, published or ours, under our names."""
    found = _mirror_names(state, _stages)
    # Pointwise layers are published as convolutions.
    return {
        name: tensor.flatten(1) if _POINTWISE.search(name) and tensor.ndim == 4 else tensor
        for name, tensor in found.items()
    }


def plain_resmlp_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a plain ResMLP, published, timm's or ours, under timm's names."""

    def rename(name: str) -> str:
        ours = re.sub(r"^patch_embed\.", "stem.", strip_wrappers(name))
        ours = re.sub(r"^(blocks\.\d+)\.attn\.", r"\1.linear_tokens.", ours)
        ours = re.sub(r"^(blocks\.\d+)\.mlp\.", r"\1.mlp_channels.", ours)
        return re.sub(r"\.gamma_([12])$", r".ls\1", ours)

    return {name: _as_timm(name, tensor) for name, tensor in renamed(state, rename).items()}


def plain_convnext_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a plain ConvNeXt, published, timm's or ours, under our names."""
    words = {
        r"\.dwconv\.": ".conv_dw.",
        r"\.pwconv([12])\.": r".mlp.fc\1.",
        # timm's own ConvNeXt
        r"^stages\.(\d+)\.blocks\.": r"stages.\1.",
        r"^stages\.(\d+)\.downsample\.": r"entries.\1.",
        r"^stem\.0\.": "stem.",
        r"^stem\.1\.": "entries.0.",
        r"^head\.norm\.": "norm.",
        r"^head\.fc\.": "head.",
    }

    def rename(name: str) -> str:
        ours = _stages(strip_wrappers(name))
        for pattern, word in words.items():
            ours = re.sub(pattern, word, ours)
        return ours

    found = renamed(state, rename)
    for name, tensor in found.items():
        if name.endswith(".gamma"):
            found[name] = tensor.flatten()
        elif _DENSE.search(name) and tensor.ndim == 4:
            found[name] = tensor.flatten(1)
    return found


def _mirror_names(state: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    def spelled(name: str) -> str:
        ours = rename(strip_wrappers(name))
        return _PART.sub(lambda m: f"{m[1]}{_WORDS[m[2]]}_{_PARTS[m[3]]}", ours)

    weights = {
        name: tensor
        for name, tensor in state.items()
        if not (name.endswith(_ORDERS) or _is_zero_center(name, tensor))
    }
    return renamed(weights, spelled)


def _as_timm(name: str, tensor: Tensor) -> Tensor:
    """An affine layer's vectors in the shape [1 1 D] that timm gives them."""
    vector = tensor.ndim == 1 and name.endswith((".alpha", ".beta"))
    return tensor[None, None] if vector else tensor


def _is_zero_center(name: str, tensor: Tensor) -> bool:
    """Whether an entry is the zero that our filters have anyway; otherwise it is left over."""
    known = name.endswith(".zero_center") or name == "zero_center"
    return known and (tensor.device.type == "meta" or not torch.any(tensor))


def _scales(name: str) -> str:
    return re.sub(r"(^|\.)gamma_([12])\.", r"\1ls\2.", name)


def _stages(name: str) -> str:
    """ConvNeXt's published places: the isotropic one's blocks are our only stage's."""
    name = re.sub(r"^blocks\.", "stages.0.", name)
    name = re.sub(r"^downsample_layers\.0\.0\.", "stem.", name)
    name = re.sub(r"^downsample_layers\.0\.1\.", "entries.0.", name)
    name = re.sub(r"^downsample_layers\.", "entries.", name)
    return re.sub(r"^(entries\.\d+\.1)\.linear2\.", r"\1.linear.", name)
