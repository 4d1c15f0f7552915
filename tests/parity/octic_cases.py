"""Runners of the parity topic `octic`: our layers and models on the reference's golden cases.

Stored features come as five tensors A1 A2 B1 B2 [... C], E [... 2 2C]; side by side, E's rows one
after the other, they are our storage.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octic.actions import act, act_on_tokens
from octic.attention import OcticAttention
from octic.block import OcticBlock
from octic.invariants import InvariantHead, make_invariantization
from octic.layers import (
    OcticGELU,
    OcticLayerNorm,
    OcticLinear,
    OcticMlp,
    OcticScale,
)
from octic.patch_embed import OcticLift, OcticPatchEmbed, OcticToPatch, Unfold
from tests.octic.regular import from_regular, regular_action, to_regular
from tests.parity.harness import NotBuilt
from tests.parity.octic_case import (
    D4,
    DTYPES,
    Case,
    loss_of,
    split_packed,
)
from tests.parity.octic_models import deit, dino
from vit.block import Block
from vit.packing import pack, unpack
from vit.parallel import ParallelBlock
from vit.vision_transformer import resample_grid

# Group, transforms, actions.


def fourier(c: Case) -> None:
    stacked = torch.stack([c.tensor(f"in.x.{i}") for i in range(8)], dim=-2).flatten(-2)
    c.check_unpacked("out.iso", from_regular(stacked, D4))
    regular = to_regular(c.unpacked("in.x"), D4).unflatten(-1, (8, -1))
    for i, part in enumerate(regular.unbind(-2)):
        c.check(f"out.reg.{i}", part)


def tuple_packing(c: Case) -> None:
    c.check_packed("out.packed", c.unpacked("in.x"))
    c.check_unpacked("out.unpacked", c.packed("in.p"))


def group_actions(c: Case) -> None:
    regular = torch.stack([c.tensor(f"in.x.{i}") for i in range(8)], dim=-2)
    tokens = c.unpacked("in.t")
    side = int(tokens.shape[1] ** 0.5)
    for element in D4.elements:
        c.check(f"out.image.{element.name}", element.on_images(c.tensor("in.img")))
        moved = torch.tensor(regular_action(element, D4), dtype=c.dtype) @ regular
        for i, part in enumerate(moved.unbind(-2)):
            c.check(f"out.regular.{element.name}.{i}", part)
        c.check_unpacked(f"out.isotypic.{element.name}", act(c.unpacked("in.x"), element, D4))
        acted = act_on_tokens(tokens, element, D4, (side, side))
        c.check_unpacked(f"out.spatial_isotypic.{element.name}", acted)


def symmetric_unfolding(c: Case) -> None:
    def unfold(quarters: list[Tensor]) -> Tensor:
        side = 2 * quarters[0].shape[0]
        spread = Unfold(side, side, scaled=False, group=D4)
        return spread(torch.stack([q.movedim(-1, 0) for q in quarters])).movedim(1, -1)

    for i, part in enumerate(unfolded(unfold([c.tensor(f"in.w.{i}") for i in range(6)]))):
        c.check(f"out.d0.{i}", part)
    batched = [c.tensor(f"in.wb.{i}") for i in range(6)]
    grids = [unfold([q[b] for q in batched]) for b in range(batched[0].shape[0])]
    for i, part in enumerate(unfolded(torch.stack(grids, dim=1))):
        c.check(f"out.d1.{i}", part)


def unfolded(components: Tensor) -> list[Tensor]:
    """Components first [8 ...] in the storage order, as a list in the published order."""
    return [components[index] for index in D4.published_order]


def pos_embed_interpolation(c: Case) -> None:
    sizes = {key.split(".")[1] for key in c.tensors if key.startswith("out.")}
    for size in sizes:
        height, width = (int(side) // c.args["patch_size"] for side in size.split("x"))
        for i in range(8):
            grid = c.tensor(f"in.pe.{i}")[None]
            resampled = (
                grid if grid.shape[1:3] == (height, width) else resample_grid(grid, (height, width))
            )
            c.check(f"out.{size}.{i}", resampled[0])


# Layers.


def packed_layer(make: Callable[[dict[str, Any]], nn.Module]) -> Callable[[Case], None]:
    def run(c: Case) -> None:
        layer = c.loaded(make(c.args))
        y = layer(c.packed("in.x"))
        c.check_packed("out.y", y)
        c.check_gradients(loss_of(*split_packed(y)), layer)

    return run


def gelu(c: Case) -> None:
    y = OcticGELU()(c.packed("in.x"))
    c.check_packed("out.packed", y)
    c.check_unpacked("out.unpacked", y)
    c.check_gradients(loss_of(*split_packed(y)))


def lift(c: Case) -> None:
    """One irrep of a lift, the others being zero; of our strides it has only the patch's."""
    args, irrep = c.args, c.args["irrep"]
    side = one_side(args["kernel_size"])
    if side == 2 or one_side(args["stride"]) != side:
        raise NotBuilt(f"a lift with kernels of {side} pixels and stride {args['stride']}")
    bias = args.get("bias", False)
    layer = OcticLift(args["in_channels"], 8 * args["out_channels"], side, bias=bias).to(c.dtype)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    slot = layer.get_submodule("conv_E_left" if irrep == "E" else f"conv_{irrep}")
    slot.load_state_dict(c.state())
    first = {"A1": 0, "A2": 1, "B1": 2, "B2": 3, "E": 4}[irrep]
    rows = [D4.published_order[first]] + ([D4.published_order[5]] if irrep == "E" else [])
    maps = layer(c.leaf("img")).unflatten(1, (8, -1))
    weight = layer.filters().unflatten(0, (8, -1))[rows[0]]
    c.check("out.weight", weight)
    for i, row in enumerate(rows):
        c.check(f"out.y.{i}" if irrep == "E" else "out.y", maps[:, row])
    c.check_gradients(loss_of(weight, *(maps[:, row] for row in rows)), slot)


def one_side(size: int | list[int]) -> int:
    """The side of a square that may be told as a pair."""
    return size if isinstance(size, int) else size[0]


def whole_lift(c: Case) -> None:
    args = c.args
    side = one_side(args["kernel_size"])
    layer = OcticLift(args["in_channels"], args["out_channels"], side, bias=args["bias"])
    y = c.loaded(layer)(c.leaf("img")).unflatten(1, (8, -1))
    maps = [y[:, row] for row in D4.published_order]
    for i, part in enumerate(maps):
        c.check(f"out.y.{i}", part)
    c.check_gradients(loss_of(*maps), layer)


def patch_embed(c: Case) -> None:
    args = c.args
    layer = OcticPatchEmbed(
        patch_size=one_side(args.get("patch_size", 16)),
        in_chans=args.get("in_chans", 3),
        embed_dim=args.get("embed_dim", 768),
        bias=args.get("bias", True),
    )
    normed = bool(args.get("norm_layer"))
    if normed:  # which the published embedding takes in and no published net asks for
        layer.norm = OcticLayerNorm(args.get("embed_dim", 768))
    layer = c.loaded(layer)
    y = layer(c.leaf("img")).flatten(1, 2)
    y = layer.norm(y) if normed else y
    c.check_packed("out.y", y)
    c.check_gradients(loss_of(*split_packed(y)), layer)


def isotypic_to_patch(c: Case) -> None:
    args = c.args
    layer = OcticToPatch(
        args["dim"],
        args["patch_side"],
        out_chans=args.get("out_channels", 3),
        bias=args.get("bias", True),
    )
    # The reference computes eight quarters and reads six; ours reads the same six of eight.
    layer = c.loaded(layer)
    x = c.packed("in.x")
    side = int(x.shape[1] ** 0.5)
    y = layer.image(x, (side, side)) if args.get("reshape_to_image") else layer(x)
    c.check("out.y", y)
    c.check_gradients(loss_of(y), layer)


def mlp(args: dict[str, Any]) -> nn.Module:
    bias = args.get("bias", True)
    return OcticMlp(
        args["in_features"],
        args.get("hidden_features"),
        args.get("out_features"),
        bias=bias if isinstance(bias, bool) else tuple(bias),
        norm=bool(args.get("norm_layer")),
    )


def block_keywords(c: Case) -> dict[str, Any]:
    """Options of a block; what is not given is the published block's own default."""
    args, state = c.args, c.state()
    scaled = "Layer_scale_init" in c.reference  # DeiT III's; DINOv2's has no scale unless asked
    return {
        "dim": args["dim"],
        "num_heads": args["num_heads"],
        "mlp_ratio": args.get("mlp_ratio", 4.0),
        "qkv_bias": args.get("qkv_bias", False),
        "proj_bias": args.get("proj_bias", True),
        # `ffn_bias` of DINOv2's blocks; timm's go by `proj_bias`.
        "mlp_bias": any(name.startswith("mlp.") and name.endswith("bias") for name in state),
        # DeiT III's scales even by 0; the stored scale is loaded.
        "init_values": (args.get("init_values") or 1e-4) if scaled else args.get("init_values"),
    }


def octic_block(c: Case) -> None:
    """One packed feature, or a list of them by name."""
    block = c.loaded(OcticBlock(**block_keywords(c)))
    if c.has("in.x.A1"):
        y = block(c.packed("in.x"))
        c.check_packed("out.y", y)
        c.check_gradients(loss_of(*split_packed(y)), block)
        return
    names = sorted({key.split(".")[1] for key in c.tensors if key.startswith("in.")})
    x, packing = pack([c.packed(f"in.{name}") for name in names])
    outputs = unpack(block(x, packing), packing.groups)
    for name, y in zip(names, outputs, strict=True):
        c.check_packed(f"out.{name}", y)
    c.check_gradients(loss_of(*(part for y in outputs for part in split_packed(y))), block)


def plain_block(c: Case) -> None:
    """One sequence of tokens, or a list of them by name."""
    kind = ParallelBlock if c.reference.endswith("paralx2") else Block
    block = c.loaded(kind(**block_keywords(c)))
    if c.has("in.x"):
        y = block(c.leaf("x"))
        c.check("out.y", y)
        c.check_gradients(loss_of(y), block)
        return
    names = sorted(key.removeprefix("in.") for key in c.tensors if key.startswith("in."))
    x, packing = pack([c.leaf(name) for name in names])
    outputs = unpack(block(x, packing), packing.groups)
    for name, y in zip(names, outputs, strict=True):
        c.check(f"out.{name}", y)
    c.check_gradients(loss_of(*outputs), block)


INVARIANTS = {
    "NonInvariant": "none",
    "LinearInvariant": "linear",
    "PowerSpectrumInvariant": "power_spectrum",
    "PolynomialInvariant": "polynomial",
    "ThirdOrderInvariant": "third_order",
    "MaxFilteringInvariant": "max_filtering",
    "CanonizationInvariant": "canonization",
}


def invariant(c: Case) -> None:
    kind = INVARIANTS[c.reference.rpartition(".")[2]]
    dim = next(c.args[key] for key in ("C", "dim", "input_channels") if key in c.args)
    layer = make_invariantization(kind, dim)
    if kind == "max_filtering" and "num_references" in c.args:
        layer = type(layer)(dim, num_references=c.args["num_references"])
    layer = c.loaded(layer)
    y = layer(c.packed("in.x"))
    c.check("out.y", y)
    c.check_gradients(loss_of(y), layer)


def invariant_head(c: Case) -> None:
    width = c.tensor("in.z").shape[-1]
    norm = c.args.get("norm", False)
    head = InvariantHead(width, c.args["C"], c.args["num_classes"], norm=norm)
    y = c.loaded(head)(c.leaf("z"))
    c.check("out.y", y)
    c.check_gradients(loss_of(y), head)


# By the class or function of the reference, whatever a case is called.
BY_REFERENCE: dict[str, Callable[[Case], None]] = {
    "regular_to_isotypic_D8": fourier,
    "convert_8tuple_to_5tuple": tuple_packing,
    "image_space_group_action": group_actions,
    "isotypic_dim_interpolation": symmetric_unfolding,
    "interpolate_spatial_tuple": pos_embed_interpolation,
    "LinearD8": packed_layer(
        lambda a: OcticLinear(a["input_channels"], a["output_channels"], bias=a.get("bias", True))
    ),
    "AffineD8": packed_layer(lambda a: OcticScale(a["dim"], bias=a.get("bias", True))),
    "LayerScaleD8": packed_layer(lambda a: OcticScale(a["dim"], a.get("init_values", 1e-5))),
    "LayerNormD8": packed_layer(
        lambda a: OcticLayerNorm(
            a["channels"],
            eps=a.get("eps", 1e-5),
            affine=a.get("elementwise_affine", True),
            bias=a.get("bias", True),
        )
    ),
    "GeluD8": gelu,
    "MlpD8": packed_layer(mlp),
    "LiftIrrepD8Conv2d": lift,
    "LiftD8": whole_lift,
    "PatchEmbedD8": patch_embed,
    "IsotypicToPatchD8": isotypic_to_patch,
    "AttentionD8": packed_layer(
        lambda a: OcticAttention(
            a["dim"],
            num_heads=a.get("num_heads", 8),
            qkv_bias=a.get("qkv_bias", True),
            proj_bias=a.get("proj_bias", True),
        )
    ),
    **dict.fromkeys(("Layer_scale_init_BlockD8", "BlockD8", "NestedTensorBlockD8"), octic_block),
    **dict.fromkeys(("Layer_scale_init_Block", "Block", "NestedTensorBlock"), plain_block),
    **dict.fromkeys(("Layer_scale_init_Block_paralx2", "Block_paralx2"), plain_block),
    "invariant_head_factory": invariant_head,
    **dict.fromkeys(INVARIANTS, invariant),
    "OcticVisionTransformer": deit,
    "OcticDinoVisionTransformer": dino,
}


def run(case: dict[str, Any], folder: Path) -> None:
    """Run one case in float64 and in float32."""
    words = re.findall(r"\w+", case["reference"])
    runner = next((BY_REFERENCE[word] for word in words if word in BY_REFERENCE), None)
    if runner is None:
        raise NotBuilt(f"no runner for {case['reference']}")
    for dtype, key in DTYPES:
        prepared = Case(case, folder, dtype, case[key])
        if case.get("optional") and prepared.has_other_token_parts():
            # Declined: tokens live in A1; a file with other parts is refused, not misread.
            with pytest.raises(ValueError, match=r"left over: (cls|mask|register)_tokens?\.[1-7]"):
                runner(prepared)
            continue
        runner(prepared)
        prepared.assert_complete()


RUNNERS: dict[str, Callable[[dict[str, Any], Path], None]] = {"*": run}
