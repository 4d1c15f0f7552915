"""Runners of the parity topic `gevit`: groups, attention, blocks, nets, stems and the schedule."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from baselines.gevit.attention import GroupSelfAttention, LiftingSelfAttention
from baselines.gevit.block import Block
from baselines.gevit.gcnn import GCNN, GroupConv, LiftingConv
from baselines.gevit.groups import PlaneGroup
from baselines.gevit.network import GEViT
from baselines.gevit.positions import global_offsets, local_offsets, turned
from baselines.gevit.stems import patch_elements
from baselines.gevit.weights import published_state
from baselines.posthoc.groups import CopyGroup, group_name
from deit.schedules import EpochCosine
from tests.parity.gevit_published_gcnn import (
    PublishedGCNN,
    PublishedGroupConv,
    PublishedLiftingConv,
    published_kernels,
)
from tests.parity.harness import Runner, check, check_gradients, load, strip
from utils.symmetry import interpolated

NORMS = {"LayerNorm": "layer", "BatchNorm": "batch"}


class Loaded:
    """A case in float64: its tensors, and our module with its weights."""

    def __init__(
        self,
        case: dict[str, Any],
        folder: Path,
        module: nn.Module,
        rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> None:
        self.tensors = load(case, folder, torch.float64)
        self.tolerance = case["tolerance"]["rel_float64"]
        self.module = module.double().eval()
        state = strip(self.tensors, case.get("state_prefix", "state."))
        renamed = rename(state) if rename else published_state(state, self.module)
        self.module.load_state_dict(renamed, strict=True)
        take_positions(state, self.module)
        self.x = self.tensors["in.x"].requires_grad_("grad.x" in self.tensors)

    def check(self, name: str, value: Tensor) -> None:
        # Published layers write oblong maps [.. H W] as [.. W H], entry by entry.
        check(name, value.reshape(self.tensors[name].shape), self.tensors[name], self.tolerance)

    def check_gradients(self, output: Tensor) -> None:
        stored = strip(self.tensors, "grad.")
        if not stored:
            return
        cotangent = self.tensors["in.cotangent"]
        (output.reshape(cotangent.shape) * cotangent).sum().backward()
        ours = {_published(name, self.module): p for name, p in self.module.named_parameters()}
        found = {name: ours.pop(name).grad for name in stored if name != "x"}
        check_gradients({"x": self.x.grad, **found}, stored, self.tolerance)
        without = {name for name, parameter in ours.items() if parameter.grad is not None}
        assert not without, f"no stored gradient for {sorted(without)}"


def _published(name: str, module: nn.Module) -> str:
    if isinstance(module, PublishedGCNN | PublishedGroupConv | PublishedLiftingConv):
        return name.replace("weight", "kernel.weight")
    if not isinstance(module, GEViT):
        return name
    if name.startswith("stem."):
        return name.removeprefix("stem.")
    if name.startswith("head."):
        name = name.replace("head", f"transformer.{len(module.transformer)}", 1)
    return name if module.stem is None else f"gevit.{name}"


def group_of(case: dict[str, Any]) -> PlaneGroup:
    order = case["group"]["num_elements"]
    if case["group"]["class"] == "SE2":
        return PlaneGroup(order, mirrors=False)
    return PlaneGroup(order // 2, mirrors=True)


def group_tables(case: dict[str, Any], folder: Path) -> None:
    """Elements, products, inverses, both relation tables and the tables of positions."""
    stored, group = load(case, folder), group_of(case)
    count = range(group.order)
    exact = {
        "out.g_indices": group.relations("reference"),
        "out.g_indices_exact": group.relations("exact"),
        "out.compose": [[group.compose(a, b) for b in count] for a in count],
        "out.inverse": [group.inverse(a) for a in count],
    }
    for name, ours in exact.items():
        if name in stored:
            check(name, torch.as_tensor(ours), stored[name], 0, "exact")
    atol = case["tolerance"]["atol"]
    check("elements", torch.as_tensor(group.elements()), stored["out.elements"], atol, "absolute")
    for name, expected in stored.items():
        kind, _, size = name.removeprefix("out.").partition(".")
        if kind.startswith(("local_", "global_")):
            side = int(size[1:])
            both = (_local if kind.startswith("local") else _global)(side, group)
            ours = both[0] if kind.endswith("row") else both[1]
            check(name, ours.reshape(expected.shape), expected, atol, "absolute")


def _local(side: int, group: PlaneGroup) -> tuple[Tensor, ...]:
    return tuple(torch.as_tensor(table) for table in turned(local_offsets(side), group))


def _global(side: int, group: PlaneGroup) -> tuple[Tensor, ...]:
    """Tables of offsets spelt out for every pair of pixels."""
    place = places_of_pairs(side)
    return tuple(torch.as_tensor(table)[:, place] for table in turned(global_offsets(side), group))


def places_of_pairs(side: int) -> Tensor:
    """Where the offset of two pixels of a map stands in our tables [row, column, row, column]."""
    line = torch.arange(side)
    apart = line - line[:, None] + side - 1
    return apart[:, None, :, None] * (2 * side - 1) + apart[None, :, None, :]


def take_positions(state: dict[str, Tensor], module: nn.Module) -> None:
    """Give attention layers the file's positions, which are ours rounded to float32.

    With ours the gradients of the position functions differ by that rounding, at times by more
    than a case allows.
    """
    for name, table in state.items():
        owner, _, kind = name.removeprefix("gevit.").rpartition(".")
        if kind not in ("row_indices", "col_indices"):
            continue
        offsets = module.get_submodule(owner).neighbours.offsets
        ours = offsets.rows if kind == "row_indices" else offsets.cols
        places = torch.arange(ours.shape[1])
        if table.ndim == 5:
            places = places_of_pairs(table.shape[1]).flatten()
        check(name, ours[:, places], table.flatten(1), 1e-6, "absolute")
        ours[:, places] = table.flatten(1)


def attention_options(case: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    """Published keywords of an attention layer, as ours."""
    return {
        "in_channels": args["in_channels"],
        "mid_channels": args["mid_channels"],
        "out_channels": args["out_channels"],
        "num_heads": args["num_heads"],
        "attn_drop_rate": args["attention_dropout_rate"],
        "window": args.get("patch_size"),
        "map_size": args.get("max_pos_embedding"),
    }


def lifting(case: dict[str, Any], folder: Path) -> None:
    """Outputs, probabilities and gradients, in one piece and in tiles."""
    layer = LiftingSelfAttention(group_of(case), **attention_options(case, case["ctor"]))
    run_attention(Loaded(case, folder, layer))


def group_attention(case: dict[str, Any], folder: Path) -> None:
    layer = GroupSelfAttention(
        group_of(case),
        **attention_options(case, case["ctor"]),
        group_table=case.get("group_table", "reference"),
    )
    run_attention(Loaded(case, folder, layer))


def run_attention(c: Loaded) -> None:
    for memory_mb, recompute in ((64.0, False), (1e-6, True)):
        c.module.memory_mb, c.module.recompute = memory_mb, recompute
        c.module.zero_grad()
        c.x.grad = None
        y = c.module(c.x)
        c.check("out.y", y)
        c.check_gradients(y)
    if "out.attn" in c.tensors:
        c.check("out.attn", c.module.probabilities(c.x))


def block(case: dict[str, Any], folder: Path) -> None:
    args = case["ctor"]
    inner = attention_options(case, args["attention"])
    module = Block(
        group_of(case),
        args["in_channels"],
        args["out_channels"],
        inner["num_heads"],
        mid_channels=inner["mid_channels"],
        window=inner["window"],
        map_size=inner["map_size"],
        crop=args["crop_size"],
        norm=NORMS[args["norm_type"]],
        act=args["activation_function"].lower(),
        attn_drop_rate=inner["attn_drop_rate"],
        value_drop_rate=args["value_dropout_rate"],
        group_table=case.get("group_table", "reference"),
    )
    c = Loaded(case, folder, module)
    y = c.module(c.x)
    c.check("out.y", y)
    c.check_gradients(y)


def net(case: dict[str, Any], folder: Path) -> None:
    """Logits, the lifting, and every item of `transformer`, the classifier being the last.

    With `return_attn_probs` the published net stops at the lifting and its probabilities.
    """
    args = case["ctor"]
    module = GEViT(
        group=group_of(case),
        group_table=case.get("group_table", "reference"),
        img_size=args["image_size"],
        in_chans=args["in_channels"],
        num_classes=args.get("num_classes", 10),
        num_channels=args["num_channels"],
        num_heads=args["num_heads"],
        norm=NORMS[args.get("norm_type", "LayerNorm")],
        block_sizes=args["block_sizes"],
        expansion=args["expansion_per_block"],
        crop=args["crop_per_layer"],
        norm_between=args["normalize_between_layers"],
        pool_last=args["maxpool_after_last_block"],
        pool_drop_rate=args.get("dropout_rate_after_maxpooling", 0.0),
        window=args.get("patch_size"),
        act=args["activation_function"].lower(),
        attn_drop_rate=args["attention_dropout_rate"],
        value_drop_rate=args["value_dropout_rate"],
        input_drop_rate=args.get("input_dropout_rate", 0.0),
        whitening_scale=args.get("whitening_scale", 2**0.5),
        allow_odd=True,
    )
    c = Loaded(case, folder, module)
    if args.get("return_attn_probs"):
        c.check("out.lift", c.module.lift(c.x))
        c.check("out.attn", c.module.lifting_self_attention.probabilities(c.x))
        return
    logits = c.module(c.x)
    c.check("out.logits", logits)
    c.check_gradients(logits)
    with torch.no_grad():
        if "out.lift" in c.tensors:
            c.check("out.lift", c.module.lift(c.x))
        last, kept = c.module.trace(c.x)
        kept[len(kept)] = c.module.head(last)
        for name in c.tensors:
            if name.startswith("out.feat."):
                c.check(name, kept[int(name.removeprefix("out.feat."))])


def modern_vit(case: dict[str, Any], folder: Path) -> None:
    args = case["ctor"]
    patch = args.get("patch_size", 7)
    side = int(args.get("num_patches", 16) ** 0.5) * patch
    module = modern_vit_of(
        img_size=side,
        in_chans=args.get("num_channels", 1),
        num_classes=args.get("num_classes", 10),
        window=args.get("att_patch_size"),
        allow_odd=True,
        stem_options={
            "patch_size": patch,
            "width": args.get("n_embd", 64),
            "mirrors": args.get("flips", False),
        },
    )
    # The published class averages over other rotations than its attention has, if asked to.
    module.stem.elements = moved_patches(args.get("n_rotations", 4), args.get("flips", False))
    c = Loaded(case, folder, module)
    y = c.module(c.x)
    c.check("out.y", y)
    c.check_gradients(y)


class Moved(NamedTuple):
    """One symmetry of patches that is not one of the pixel grid."""

    angle: float
    mirrored: bool

    def on_images(self, patches: Tensor) -> Tensor:
        """Patches [B h w C p p] turned, by the nearest pixel of a grid in their own dtype."""
        turned = interpolated(patches.flatten(0, 3), self.angle, InterpolationMode.NEAREST)
        turned = turned.flip(-1) if self.mirrored else turned
        return turned.unflatten(0, patches.shape[:4])


def moved_patches(rotations: int, mirrors: bool) -> tuple[Any, ...]:
    """What the published class averages patches over."""
    if rotations in (1, 2, 4):
        return patch_elements(rotations, mirrors)
    return tuple(Moved(*copy) for copy in CopyGroup(group_name(rotations, mirrors)).copies)


def modern_vit_of(**options: Any) -> GEViT:
    """The published settings of the modern equivariant ViT."""
    fixed = {"group": "p4", "num_channels": 20, "num_heads": 9, "block_sizes": (2, 3)}
    return GEViT(stem="patch", crop=(1, 0, 0, 0, 0), norm_between=True, **fixed, **options)


def published_gcnn(case: dict[str, Any], folder: Path) -> None:
    """Interpolated kernels: lifting, group convolution, and the whole stem."""
    args = dict(case["ctor"])
    over = {
        "order": case["group"]["order"],
        "mirrors": case["group"]["class"] == "E2Group",
    }
    if case["kind"] == "gcnn":
        # Of these the published constructor makes nothing.
        args = {key: args[key] for key in args.keys() - {"out_channels", "output_dimensionality"}}
        module: nn.Module = PublishedGCNN(**args, **over)
    else:
        made = PublishedGroupConv if case["kind"] == "gcnn_group" else PublishedLiftingConv
        module = made(**args, **over)
    c = Loaded(case, folder, module, published_kernels)
    y = c.module(c.x)
    c.check("out.y", y)
    c.check_gradients(y)


def exact_gcnn(case: dict[str, Any], folder: Path) -> None:
    """Our exact convolutions against an oracle written for the sheet."""
    args, group = case["ctor"], case["ctor"].get("group", "D4")
    if case["kind"] == "exact_gcnn_stem":
        module: nn.Module = GCNN(
            args["in_channels"],
            out_channels=args["hidden_channels"],
            hidden_channels=args["hidden_channels"],
            kernel_size=args["kernel_size"],
            num_hidden=args["num_hidden"],
            pool=args["pool"],
            group=group,
        )
    else:
        made = LiftingConv if case["kind"] == "exact_gcnn_lift" else GroupConv
        module = made(
            args["in_channels"],
            args["out_channels"],
            args["kernel_size"],
            padding=args.get("padding", 0),
            group=group,
        )
    c = Loaded(case, folder, module)
    y = c.module(c.x)
    c.check("out.y", y)
    c.check_gradients(y)


def schedule(case: dict[str, Any], folder: Path) -> None:
    """Warm-up from zero, then a cosine of its own: the recipe's schedule, an epoch being a step."""
    for settings, values in case["values"].items():
        ratio, steps = (float(part.split("=")[1]) for part in settings.split(","))
        ours = EpochCosine(
            base=1.0,
            final=0.0,
            epochs=steps,
            epoch_length=1,
            warmup_epochs=int(steps * ratio),
            cosine_after_warmup=True,
        )
        for step, expected in values.items():
            check(f"{settings} step {step}", ours(int(step)), expected, 1e-9, "absolute")


RUNNERS: dict[tuple[str, str], Runner] = {
    ("gevit", "group_tables"): group_tables,
    ("gevit", "lift_local"): lifting,
    ("gevit", "lift_global"): lifting,
    ("gevit", "group_local"): group_attention,
    ("gevit", "group_global"): group_attention,
    ("gevit", "block"): block,
    ("gevit", "net"): net,
    ("gevit", "modern_vit"): modern_vit,
    ("gevit", "gcnn_lift"): published_gcnn,
    ("gevit", "gcnn_group"): published_gcnn,
    ("gevit", "gcnn"): published_gcnn,
    ("gevit", "exact_gcnn_lift"): exact_gcnn,
    ("gevit", "exact_gcnn_group"): exact_gcnn,
    ("gevit", "exact_gcnn_stem"): exact_gcnn,
    ("gevit", "schedule"): schedule,
}
