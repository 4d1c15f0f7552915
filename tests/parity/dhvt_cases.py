"""Runners of the parity topic `dhvt`: stem, head tokens, feed-forward, blocks, whole networks."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from timm.layers import Mlp, PatchEmbed
from torch import Tensor, nn

from baselines.dhvt.layers import (
    DHVTBlock,
    DynamicAggregationFeedForward,
    HeadInteractedAttention,
)
from baselines.dhvt.network import DHVT
from baselines.dhvt.stem import Affine, OverlappingPatchEmbed
from tests.parity.harness import NotBuilt, check, load, strip
from vit.attention import Attention
from vit.block import Block
from vit.weights import load_state

# What makes no difference to a layer that is loaded: the published ones have three channels.
UNREAD = (
    *("drop", "proj_drop", "with_bn", "img_size", "in_chans", "qk_scale", "init_values"),
    *("act_layer", "norm_layer", "weight_init"),
)


def layer(case: dict[str, Any], folder: Path) -> None:
    """One layer, by the published class."""
    name = case["reference"]["class"]
    if name not in LAYERS:
        raise NotBuilt(f"no layer {name}")
    read = ("img_size", "in_chans", "norm_layer") if name == "PatchEmbed" else ()
    unread = set(UNREAD) - set(read)
    options = {key: value for key, value in case["kwargs"].items() if key not in unread}
    module, run = LAYERS[name](options)
    _run(case, folder, module, run)


def model(case: dict[str, Any], folder: Path) -> None:
    """A whole network."""
    unread = {*UNREAD, "apply_dhvt"} - {"img_size"}
    options = {key: value for key, value in case["kwargs"].items() if key not in unread}
    if not case["kwargs"].get("apply_dhvt", True):
        raise NotBuilt("the reference builds no network without apply_dhvt")
    options["patch_size"] = _side(options.get("patch_size", 16))
    net = DHVT(**{"img_size": 32, "num_classes": 100, **options})
    _run(case, folder, net, net)


def _affine(options: dict[str, Any]) -> tuple[nn.Module, Callable]:
    module = Affine(options["dim"])
    return module, module


def _stem(options: dict[str, Any]) -> tuple[nn.Module, Callable]:
    side = _side(options.get("patch_size", 16))
    module = OverlappingPatchEmbed(side, 3, options.get("embed_dim", 768))
    return module, lambda images: module(images).flatten(1, 2)


def _attention(options: dict[str, Any]) -> tuple[nn.Module, Callable]:
    module = HeadInteractedAttention(options.pop("dim"), **{"qkv_bias": False, **options})
    return module, module


def _plain_attention(options: dict[str, Any]) -> tuple[nn.Module, Callable]:
    module = Attention(options.pop("dim"), **{"qkv_bias": False, **options})
    return module, module


def _feed_forward(options: dict[str, Any]) -> tuple[nn.Module, Callable]:
    module = DynamicAggregationFeedForward(
        options["in_features"],
        options.get("hidden_features") or options["in_features"],
        kernel_size=options.get("kernel_size", 3),
        out_dim=options.get("out_features"),
    )
    return module, lambda x: module(x, _square(x))


def _block(options: dict[str, Any]) -> tuple[nn.Module, Callable]:
    module = DHVTBlock(options.pop("dim"), **_block_options(options))
    return module, lambda x: module(x, _square(x))


def _plain_block(options: dict[str, Any]) -> tuple[nn.Module, Callable]:
    module = Block(options.pop("dim"), **_block_options(options))
    return module, module


def _block_options(options: dict[str, Any]) -> dict[str, Any]:
    """Our keywords of a block, with the published defaults where ours are others."""
    options["drop_path_rate"] = options.pop("drop_path", 0.0)
    return {"qkv_bias": False, "norm_eps": 1e-5, **options}


def _plain_mlp(options: dict[str, Any]) -> tuple[nn.Module, Callable]:
    module = Mlp(**options)
    return module, module


def _plain_stem(options: dict[str, Any]) -> tuple[nn.Module, Callable]:
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    eps = given.pop("norm_eps", 1e-5)
    if given.pop("norm_layer", None) is not None:
        given["norm_layer"] = partial(nn.LayerNorm, eps=eps)
    module = PatchEmbed(**given, strict_img_size=False)
    return module, module


LAYERS: dict[str, Callable[[dict[str, Any]], tuple[nn.Module, Callable]]] = {
    "Affine": _affine,
    "ConvPatchEmbed": _stem,
    "HI_Attention": _attention,
    "Attention": _plain_attention,
    "DAFF": _feed_forward,
    "DHVT_Block": _block,
    "Block": _plain_block,
    "Mlp": _plain_mlp,
    "PatchEmbed": _plain_stem,
}


def _side(size: int | list[int]) -> int:
    return size if isinstance(size, int) else size[0]


def _square(x: Tensor) -> tuple[int, int]:
    side = math.isqrt(x.shape[1] - 1)
    return side, side


def _run(case: dict[str, Any], folder: Path, module: nn.Module, run: Callable) -> None:
    tensors = load(case, folder)
    load_state(module, strip(tensors, "state."))
    module.train(case["mode"] == "train")
    x = tensors["in.0"].requires_grad_(case["grad"])
    out = run(x)
    check("out", out, tensors["out"], case["tolerance"], "close")
    state = module.state_dict()
    for name, value in strip(tensors, "state_after.").items():
        exact = not value.is_floating_point()
        check(name, state[name], value, case["tolerance"], "exact" if exact else "close")
    if not case["grad"]:
        return
    (out * tensors["cot"]).sum().backward()
    gradients = {"grad_in.0": x.grad}
    gradients |= {f"grad_state.{name}": p.grad for name, p in module.named_parameters()}
    rule = case["grad_tolerance"]
    for name in (name for name in tensors if name.startswith("grad_")):
        bound = rule["rel"] * max(float(tensors[name].abs().max()), rule["floor"])
        check(name, gradients[name], tensors[name], bound, "absolute")


RUNNERS = {("dhvt", "layer"): layer, ("dhvt", "model"): model}
