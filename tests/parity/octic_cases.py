"""Runners of the parity topic `octic`: our layers and models on the reference's golden cases.

Stored features come as five tensors A1 A2 B1 B2 [... C], E [... 2 2C]; side by side, E's rows one
after the other, they are our storage.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octic.actions import act, act_on_tokens, from_regular, to_regular
from octic.block import OcticBlock
from octic.invariants import InvariantHead, make_invariantization
from octic.layers import (
    OcticAttention,
    OcticGELU,
    OcticLayerNorm,
    OcticLinear,
    OcticMlp,
    OcticScale,
)
from octic.patch_embed import OcticLift, OcticPatchEmbed, OcticToPatch, Unfold
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
        moved = torch.tensor(D4.regular_action(element), dtype=c.dtype) @ regular
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
    return [components[index] for index in D4.row_major]


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
    args = c.args
    layer = OcticLift(args["in_channels"], 8 * args["out_channels"], args["kernel_size"])
    layer = layer.to(c.dtype)
    for slot in D4.slots:
        nn.init.zeros_(layer.get_submodule(f"conv_{slot.name}").weight)
    nn.init.zeros_(layer.conv_A1.bias)
    name = "E_left" if args["irrep"] == "E" else args["irrep"]
    layer.get_submodule(f"conv_{name}").load_state_dict(c.state())
    first = {"A1": 0, "A2": 1, "B1": 2, "B2": 3, "E": 4}[args["irrep"]]
    rows = [D4.row_major[first]] + ([D4.row_major[5]] if args["irrep"] == "E" else [])
    filters = layer.filters().unflatten(0, (8, -1))
    maps = layer(c.tensor("in.img")).unflatten(1, (8, -1))
    c.check("out.weight", filters[rows[0]])
    if args["irrep"] == "E":
        for i, row in enumerate(rows):
            c.check(f"out.y.{i}", maps[:, row])
    else:
        c.check("out.y", maps[:, rows[0]])


def patch_embed(c: Case) -> None:
    args = c.args
    layer = OcticPatchEmbed(
        patch_size=args.get("patch_size", 16),
        in_chans=args.get("in_chans", 3),
        embed_dim=args.get("embed_dim", 768),
        bias=args.get("bias", True),
    )
    layer = c.loaded(layer)
    y = layer(c.leaf("img")).flatten(1, 2)
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
    args = c.args
    scaled = "Layer_scale_init" in c.reference  # DeiT III's; DINOv2's has no scale unless asked
    return {
        "dim": args["dim"],
        "num_heads": args["num_heads"],
        "mlp_ratio": args.get("mlp_ratio", 4.0),
        "qkv_bias": args.get("qkv_bias", False),
        "proj_bias": args.get("proj_bias", True),
        "mlp_bias": args.get("ffn_bias", True),
        "init_values": args.get("init_values", 1e-4 if scaled else None),
    }


def octic_block(c: Case) -> None:
    block = c.loaded(OcticBlock(**block_keywords(c)))
    y = block(c.packed("in.x"))
    c.check_packed("out.y", y)
    c.check_gradients(loss_of(*split_packed(y)), block)


def block_list(c: Case) -> None:
    block = c.loaded(OcticBlock(**block_keywords(c)))
    names = sorted({key.split(".")[1] for key in c.tensors if key.startswith("in.")})
    x, packing = pack([c.packed(f"in.{name}") for name in names])
    outputs = unpack(block(x, packing), packing.groups)
    for name, y in zip(names, outputs, strict=True):
        c.check_packed(f"out.{name}", y)
    c.check_gradients(loss_of(*(part for y in outputs for part in split_packed(y))), block)


def plain_block(c: Case) -> None:
    block = c.loaded(Block(**block_keywords(c)))
    x = c.leaf("x")
    y = block(x)
    c.check("out.y", y)
    c.check_gradients(loss_of(y), block)


INVARIANTS = {
    "invariant_noninvariant": "none",
    "invariant_linear": "linear",
    "invariant_powerspectrum": "power_spectrum",
    "invariant_polynomial": "polynomial",
    "invariant_thirdorder": "third_order",
    "invariant_maxfiltering": "max_filtering",
    "invariant_canonization": "canonization",
}


def invariant(c: Case) -> None:
    kind = next(kind for name, kind in INVARIANTS.items() if c.name.startswith(name))
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


PREFIXES: dict[str, Callable[[Case], None]] = {
    "fourier": fourier,
    "tuple_packing": tuple_packing,
    "group_actions": group_actions,
    "symmetric_unfolding": symmetric_unfolding,
    "pos_embed_interpolation": pos_embed_interpolation,
    "linear": packed_layer(
        lambda a: OcticLinear(a["input_channels"], a["output_channels"], bias=a.get("bias", True))
    ),
    "affine": packed_layer(lambda a: OcticScale(a["dim"], bias=a.get("bias", True))),
    "layerscale": packed_layer(lambda a: OcticScale(a["dim"], a.get("init_values", 1e-5))),
    "layernorm": packed_layer(
        lambda a: OcticLayerNorm(
            a["channels"],
            eps=a.get("eps", 1e-5),
            affine=a.get("elementwise_affine", True),
            bias=a.get("bias", True),
        )
    ),
    "gelu": gelu,
    "mlp": packed_layer(mlp),
    "lift": lift,
    "patch_embed": patch_embed,
    "isotypic_to_patch": isotypic_to_patch,
    "attention": packed_layer(
        lambda a: OcticAttention(
            a["dim"],
            num_heads=a.get("num_heads", 8),
            qkv_bias=a.get("qkv_bias", True),
            proj_bias=a.get("proj_bias", True),
        )
    ),
    "block_nested_list": block_list,
    "block": octic_block,
    "stdblock": plain_block,
    "invariant_head": invariant_head,
    "invariant_": invariant,
    "deit": deit,
    "dino": dino,
}


def run(case: dict[str, Any], folder: Path) -> None:
    """Run one case in float64 and in float32."""
    runner = next(PREFIXES[prefix] for prefix in PREFIXES if case["name"].startswith(prefix))
    for dtype, key in DTYPES:
        prepared = Case(case, folder, dtype, case[key])
        if case.get("optional") and "frozen_tokens_nonzero" in case["name"]:
            # Declined: tokens live in A1; a file with other parts is refused, not misread.
            with pytest.raises(ValueError, match=r"cls_token\.1"):
                runner(prepared)
            continue
        runner(prepared)
        prepared.assert_complete()


RUNNERS: dict[str, Callable[[dict[str, Any], Path], None]] = {"*": run}
