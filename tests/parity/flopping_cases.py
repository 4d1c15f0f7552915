"""Runner of the parity topic `flopping`, by the published class: ResMLP, ConvNeXt, their layers.

The ViTs of the topic and what they are made of stand in `mirror_cases.py`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d
from timm.models.convnext import ConvNeXtBlock
from timm.models.mlp_mixer import Affine, ResBlock
from torch import Tensor, nn

from baselines.flopping.activation import RegularActivation
from baselines.flopping.convnext import MirrorConvNeXt, MirrorConvNeXtBlock
from baselines.flopping.filters import (
    MIRROR,
    MeanDownsample,
    MirrorDepthwiseConv,
    MirrorDownsample,
    MirrorLift,
)
from baselines.flopping.keys import (
    mirror_convnext_names,
    mirror_resmlp_names,
    plain_convnext_names,
    plain_resmlp_names,
)
from baselines.flopping.plain import MeanPoolLinear, PlainConvNeXt, PlainResMlp
from baselines.flopping.resmlp import (
    MirrorResMlp,
    MirrorResMlpBlock,
    PairLinear,
    PairMlp,
    PairScale,
    TokenLinear,
    to_pairs,
)
from octic.layers import OcticLayerNorm, OcticLinear, OcticScale
from tests.parity import mirror_cases
from tests.parity.flopping_case import (
    Golden,
    Rename,
    channels,
    first,
    halves,
    last,
    listed,
    one,
    pairs,
    plain_names,
    unpaired,
)
from tests.parity.flopping_unused import (
    NormedPairMlp,
    half_conv,
    half_depthwise,
    norm_within,
    old_block,
    old_mix,
    old_names,
    pair_norm,
)
from tests.parity.harness import NotBuilt, strip
from tests.parity.mirror_cases import pair

# What drops features at random.


def dropout(c: Golden) -> nn.Module:
    c.take("inplace", False)
    return nn.Dropout(c.take("p", 0.5))


def drop_path(c: Golden) -> nn.Module:
    return DropPath(c.take("drop_prob", 0.0), c.take("scale_by_keep", True))


# ResMLP.


def affine22(c: Golden) -> nn.Module:
    return PairScale(c.take("dim", 0), bias=c.take("bias", True))


def linear22(c: Golden) -> nn.Module:
    sides = c.take("in_channels", 0), c.take("out_channels", 0)
    return PairLinear(*sides, bias=c.take("bias", True))


def gelu22(c: Golden) -> nn.Module:
    return RegularActivation("quick_gelu", num_signs=2)


def flat_pairs(parts: Sequence[Tensor]) -> Tensor:
    return pairs(parts).flatten(-2)


def unflattened(x: Tensor) -> list[Tensor]:
    return unpaired(x.unflatten(-1, (2, -1)))


def patch_linear22(c: Golden) -> nn.Module:
    return TokenLinear(c.take("num_patches_side", 0) ** 2 // 2, bias=c.take("bias", True))


def mlp22(c: Golden) -> nn.Module:
    dim = c.take("in_features", 0)
    hidden, out = c.take("hidden_features", dim), c.take("out_features", None)
    c.take("drop", 0.0)
    bias, norm = c.take("bias", True), norm_within(c, hidden or dim)
    if norm is not None or not isinstance(bias, bool):
        biases = [bias, bias] if isinstance(bias, bool) else bias
        return NormedPairMlp(dim, hidden or dim, out or dim, biases, norm)
    return PairMlp(dim, hidden or dim, out, bias=bias)


class PatchEmbed22(nn.Module):
    """Our stem as it stands in `MirrorResMlp`."""

    def __init__(self, c: Golden) -> None:
        super().__init__()
        for name in ("img_size", "flatten", "strict_img_size", "dynamic_img_pad", "output_fmt"):
            c.take(name, None)
        patch = c.take("patch_size", 16)
        patch = tuple(patch) if isinstance(patch, list) else patch
        sides = c.take("in_chans", 3), c.take("embed_dim", 768)
        self.stem = MirrorLift(*sides, patch, bias=c.take("bias", True))
        # The published norm comes before the factor that our stem leaves out.
        self.norm = norm_within(c, sides[1]) or nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(to_pairs(self.stem(images), 1.0))


def embed_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = mirror_resmlp_names({f"patch_embed.{name}": value for name, value in state.items()})
    return {name.replace("stem.norm.", "norm."): value for name, value in found.items()}


def resmlp_block22(c: Golden) -> nn.Module:
    for name in ("init_values", "drop", "attn_drop", "drop_path"):
        c.take(name, 0.0)
    return MirrorResMlpBlock(c.take("dim", 0), c.take("num_patches", 196))


def resmlp_options(c: Golden) -> dict[str, Any]:
    """Keywords that both ResMLPs share, from the published ones."""
    size, (patch, width) = c.take("img_size", 224), pair(c.take("patch_size", 16))
    if patch != width:
        raise NotBuilt(f"{c.name}: patches of {patch} x {width} in a net")
    options = {
        "img_size": tuple(size) if isinstance(size, list) else size,
        "init_values": c.take("init_scale", 1e-4),
        "embed_dim": c.take("embed_dim", 768),
        "patch_size": patch,
        "depth": c.take("depth", 12),
    }
    for name in ("in_chans", "num_classes", "drop_rate", "drop_path_rate"):
        if name in c.kwargs:
            options[name] = c.take(name, None)
    return options


def resmlp22(c: Golden) -> nn.Module:
    return MirrorResMlp(**resmlp_options(c), invariant=invariant(c))


def invariant(c: Golden) -> str:
    return "power_spectrum" if c.take("use_symmetrized_asym_feats", False) else "trivial"


# ConvNeXt.


def depthwise(mixing: str) -> Callable[[Golden], nn.Module]:
    def make(c: Golden) -> nn.Module:
        c.take("kernel_size", 7), c.take("padding", 3)  # the published layer ignores both
        return MirrorDepthwiseConv(c.take("dim", 0), mixing=mixing)

    return make


def downsample(kind: type[nn.Module]) -> Callable[[Golden], nn.Module]:
    odd = {} if kind is MeanPoolLinear else {"allow_odd": True}
    return lambda c: kind(c.take("input_dim", 0), c.take("output_dim", 0), **odd)


def mean_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.replace("linear2.", "linear."): tensor
        for name, tensor in mirror_convnext_names(state).items()
    }


def affine2(c: Golden) -> nn.Module:
    return OcticScale(c.take("dim", 0), bias=c.take("bias", True), group=MIRROR)


def linear2(c: Golden) -> nn.Module:
    sides = c.take("input_channels", 0), c.take("output_channels", 0)
    return OcticLinear(*sides, bias=c.take("bias", True), group=MIRROR)


def norm2(c: Golden) -> nn.Module:
    return OcticLayerNorm(
        c.take("channels", 0),
        eps=c.take("eps", 1e-5),
        affine=c.take("elementwise_affine", True),
        bias=c.take("bias", True),
        group=MIRROR,
    )


def convnext_block(c: Golden) -> nn.Module:
    c.take("drop_path", 0.0)
    scale = c.take("layer_scale_init_value", 1e-6)
    return MirrorConvNeXtBlock(c.take("dim", 0), init_values=scale)


def convnext_options(c: Golden, *, isotropic: bool) -> dict[str, Any]:
    """Keywords that both ConvNeXts share, from the published ones."""
    size = c.take("img_size", 224)
    options: dict[str, Any] = {"img_size": tuple(size) if isinstance(size, list) else size}
    if isotropic:
        options |= {"depths": [c.take("depth", 18)], "dims": [c.take("dim", 384)]}
        options |= {"patch_size": 16, "init_values": c.take("layer_scale_init_value", 0)}
    else:
        options |= {"depths": c.take("depths", [3, 3, 9, 3])}
        options |= {"dims": c.take("dims", [96, 192, 384, 768])}
        options |= {"init_values": c.take("layer_scale_init_value", 1e-6)}
    for name in ("in_chans", "num_classes", "drop_path_rate", "head_init_scale"):
        if name in c.kwargs:
            options[name] = c.take(name, None)
    return options


def mirror_convnext(isotropic: bool) -> Callable[[Golden], nn.Module]:
    return lambda c: MirrorConvNeXt(
        **convnext_options(c, isotropic=isotropic), invariant=invariant(c), allow_odd=True
    )


def plain_convnext(isotropic: bool) -> Callable[[Golden], nn.Module]:
    def make(c: Golden) -> nn.Module:
        mean = c.take("use_invariant_downsampling", False)
        options = convnext_options(c, isotropic=isotropic)
        return PlainConvNeXt(**options, downsampling="mean" if mean else "conv")

    return make


def plain_resmlp(c: Golden) -> nn.Module:
    return PlainResMlp(**resmlp_options(c))


# Layers of the plain twins.


def placed(rename: Rename, theirs: str, ours: str) -> Rename:
    """Names of a layer alone, by those of its place in the published net and in ours."""
    return lambda state: strip(rename({theirs + key: value for key, value in state.items()}), ours)


def plain_convnext_block(c: Golden) -> nn.Module:
    c.take("drop_path", 0.0)
    scale = c.take("layer_scale_init_value", 1e-6)
    return ConvNeXtBlock(c.take("dim", 0), ls_init_value=scale or None)


def plain_resmlp_block(c: Golden) -> nn.Module:
    for name in ("init_values", "drop", "drop_path"):
        c.take(name, 0.0)
    return ResBlock(c.take("dim", 0), c.take("num_patches", 196))


def plain_norm(c: Golden) -> nn.Module:
    first = c.take("data_format", "channels_last") == "channels_first"
    return (LayerNorm2d if first else nn.LayerNorm)(
        c.take("normalized_shape", 0), eps=c.take("eps", 1e-6)
    )


def affine_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[None, None] for name, value in state.items()}


class ToPairs(nn.Module):
    """The order and transform of tokens within our stem."""

    def __init__(self, c: Golden) -> None:
        super().__init__()
        c.take("H", 0), c.take("W", 0)

    def forward(self, maps: Tensor) -> Tensor:
        return to_pairs(maps.permute(0, 2, 3, 1), 0.5**0.5)


def no_orders(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.endswith("_idx")}


BLOCK_NAMES = placed(plain_convnext_names, "blocks.0.", "stages.0.0.")
REDUCE_NAMES = placed(plain_convnext_names, "downsample_layers.1.1.", "entries.1.1.")
RESMLP_NAMES = placed(plain_resmlp_names, "blocks.0.", "blocks.0.")

# Published class -> our layer, our names of its parameters, storage of its inputs and outputs.
Entry = tuple[Callable[[Golden], nn.Module], Any, Callable, Callable]
CLASSES: dict[str, Entry] = {
    "Dropout2": (dropout, plain_names, channels, halves),
    "DropPath2": (drop_path, plain_names, channels, halves),
    "Dropout22": (dropout, plain_names, pairs, unpaired),
    "DropPath22": (drop_path, plain_names, pairs, unpaired),
    "Affine22": (affine22, mirror_resmlp_names, pairs, unpaired),
    "Linear22": (linear22, mirror_resmlp_names, pairs, unpaired),
    "GELU22Module": (gelu22, plain_names, flat_pairs, unflattened),
    "PatchLinear22": (patch_linear22, mirror_resmlp_names, pairs, unpaired),
    "LayerNorm22v2": (pair_norm(joint=True), mirror_resmlp_names, pairs, unpaired),
    "LayerNorm22": (pair_norm(joint=False), plain_names, pairs, unpaired),
    "Mlp22": (mlp22, mirror_resmlp_names, pairs, unpaired),
    "PatchEmbed22": (PatchEmbed22, embed_names, one, unpaired),
    "layers_scale_mlp_blocks22": (resmlp_block22, mirror_resmlp_names, pairs, unpaired),
    "resmlp_models_equi_d2_22rep": (resmlp22, mirror_resmlp_names, one, listed),
    "resmlp_models": (plain_resmlp, plain_resmlp_names, one, listed),
    "PatchLinear2": (old_mix, old_names, channels, halves),
    "layers_scale_mlp_blocks2": (old_block, old_names, channels, halves),
    "SymOrAsymConv2d": (half_conv, plain_names, one, listed),
    "SymOrAsym2x2Conv2d": (half_conv, plain_names, one, listed),
    "SymOrAsymDepthwiseConv2d": (half_depthwise, plain_names, one, listed),
    "DepthwiseConv2d2": (depthwise("full"), mirror_convnext_names, last, first),
    "SymmetricDepthwiseConv2d2": (depthwise("symmetric"), mirror_convnext_names, last, first),
    "DownsampleConv2d2": (downsample(MirrorDownsample), mirror_convnext_names, last, first),
    "InvariantDownsampleConv2d2": (downsample(MeanDownsample), mean_names, channels, halves),
    "Affine2ChannelsFirst": (affine2, mirror_convnext_names, last, first),
    "Linear2ChannelsFirst": (linear2, mirror_convnext_names, last, first),
    "ConvNeXtBlock2ChannelsFirst": (convnext_block, mirror_convnext_names, last, first),
    "ConvNeXt2": (mirror_convnext(False), mirror_convnext_names, one, listed),
    "ConvNeXtIsotropic2": (mirror_convnext(True), mirror_convnext_names, one, listed),
    "ConvNeXt": (plain_convnext(False), plain_convnext_names, one, listed),
    "ConvNeXtIsotropic": (plain_convnext(True), plain_convnext_names, one, listed),
    "BlockChannelsFirst": (plain_convnext_block, BLOCK_NAMES, one, listed),
    "Block": (plain_convnext_block, BLOCK_NAMES, one, listed),
    "InvariantDownsampleConv2d": (downsample(MeanPoolLinear), REDUCE_NAMES, one, listed),
    "LayerNorm": (plain_norm, plain_names, one, listed),
    "Affine": (lambda c: Affine(c.take("dim", 0)), affine_names, one, listed),
    "layers_scale_mlp_blocks": (plain_resmlp_block, RESMLP_NAMES, one, listed),
    "FlattenAndPermuteBCHWGridToFourier": (ToPairs, no_orders, one, lambda x: [*x.unbind(2)]),
}


EITHER_FORMAT = ("LayerNorm2LastOrFirst", "ConvNeXtBlock2")


def formatted(c: Golden) -> Entry:
    """Of a published class that takes either format, the entry for the one asked for."""
    name = c.case["reference"]["class"]
    if name == "LayerNorm2LastOrFirst":
        is_last = c.take("data_format", "channels_last") == "channels_last"
        return norm2, mirror_convnext_names, *((channels, halves) if is_last else (last, first))
    if name == "ConvNeXtBlock2":  # its output is always channels-last
        is_last = c.take("channels_last_input", True)
        return convnext_block, mirror_convnext_names, channels if is_last else last, halves
    return CLASSES[name]


def run(case: dict[str, Any], folder: Path) -> None:
    """Compare one case in float64 and float32."""
    published = case["reference"]
    ours = {*CLASSES, *EITHER_FORMAT}
    if published["class"] not in ours or published["source"].endswith("deit/models/vit.py"):
        mirror_cases.run(case, folder)
        return
    for dtype in (torch.float64, torch.float32):
        c = Golden(case, folder, dtype)
        make, rename, pack, unpack = formatted(c)
        module = c.loaded(make(c), rename).train(case.get("mode", "eval") == "train")
        c.check(unpack(module(pack(c.inputs()))))


RUNNERS = {"*": run}
