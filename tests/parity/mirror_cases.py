"""Runners of the parity topic `flopping`, ViT side: our layers over the mirror group.

Stored features are pairs (symmetric, antisymmetric) of halves; side by side they are our storage.
Everything runs in float64 and in float32, to the case's own tolerance.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octic.attention import OcticAttention
from octic.block import OcticBlock
from octic.debug_models import HalvesAttentionViT, HalvesViT
from octic.groups import get_group
from octic.layers import (
    OcticGELU,
    OcticLayerNorm,
    OcticLinear,
    OcticMlp,
    OcticScale,
)
from octic.mirror_models import EQUIVARIANT, HYBRID, INVARIANT
from octic.patch_embed import OcticPatchEmbed
from octic.vision_transformer import OcticVisionTransformer
from tests.parity.harness import NotBuilt, check, load, strip
from vit.attention import Attention
from vit.block import Block
from vit.keys import rename_published
from vit.mirror_keys import mirrored_order
from vit.parallel import ParallelBlock
from vit.vision_transformer import VisionTransformer
from vit.weights import load_state

MIRROR = get_group("mirror")
HALF = 0.5**0.5
Args = dict[str, Any]


class Case:
    """One golden case in one precision."""

    def __init__(self, case: Args, folder: Path, dtype: torch.dtype) -> None:
        self.case, self.name, self.args = case, case["name"], case["kwargs"]
        self.dtype = dtype
        self.tensors = load(case, folder, dtype)
        for name, tensor in self.tensors.items():
            if name.startswith("in.") and tensor.is_floating_point():
                tensor.requires_grad_()
        # Names within a model: the stem's alone are told by where it stands.
        self.place = "patch_embed." if case["reference"]["class"] == "PatchEmbed2" else ""
        self.state = self.placed("state.")

    def placed(self, prefix: str) -> dict[str, Tensor]:
        """Stored tensors of a kind under their names within a model."""
        return {f"{self.place}{name}": t for name, t in strip(self.tensors, prefix).items()}

    def input(self) -> Tensor:
        """Images as they are, pairs of halves side by side."""
        if "in.0" in self.tensors:
            return self.tensors["in.0"]
        return torch.cat([self.tensors["in.0.0"], self.tensors["in.0.1"]], dim=-1)

    def loaded(self, module: nn.Module) -> nn.Module:
        module = module.to(self.dtype).train(self.case.get("mode") == "train")
        load_state(module, self.state)
        return module

    def compare(self, out: Tensor, module: nn.Module | None = None, dim: int = -1) -> None:
        """Check the output, and where they are stored the gradients of inputs and weights."""
        names = [name for name in self.tensors if name == "out" or name.startswith("out.")]
        parts = dict(zip(names, [out] if len(names) == 1 else out.chunk(2, dim=dim), strict=True))
        for name, part in parts.items():
            tol = self.case["tolerance"]
            check(f"{self.name} {name}", part, self.tensors[name], tol, metric="close")
        if self.case["grad"]:
            loss = sum(
                (part * self.tensors[name.replace("out", "cot", 1)]).sum()
                for name, part in parts.items()
            )
            loss.backward()
            self._compare_gradients(module)

    def _compare_gradients(self, module: nn.Module | None) -> None:
        limit = self.case["grad_tolerance"]
        named = dict(module.named_parameters()) if module is not None else {}
        stored = self.placed("grad_state.")
        whole = {**self.state, **stored}  # what tells how the file is laid out
        renamed, _ = rename_published(whole, grid=getattr(module, "grid_size", None))
        ours = {rename_published({name: t})[0].copy().popitem()[0] for name, t in stored.items()}
        assert ours <= named.keys(), f"no such parameters: {sorted(ours - named.keys())}"
        found = {name: (named[name].grad, renamed[name]) for name in ours}
        for name, expected in strip(self.tensors, "grad_in.").items():
            found[name] = (self.tensors[f"in.{name}"].grad, expected)
        for name, (gradient, expected) in found.items():
            bound = limit["rel"] * max(float(expected.abs().max()), limit["floor"])
            check(f"{self.name} gradient {name}", gradient, expected, bound, metric="absolute")


def layer(make: Callable[[Args], nn.Module]) -> Callable[[Case], None]:
    """A runner of a layer of ours on features."""

    def run(c: Case) -> None:
        module = c.loaded(make(c.args))
        c.compare(module(c.input()), module)

    return run


def norm(args: Args) -> nn.Module:
    return OcticLayerNorm(
        args["channels"],
        eps=args.get("eps", 1e-5),
        affine=args.get("elementwise_affine", True),
        bias=args.get("bias", True),
        group=MIRROR,
    )


class NormPerHalf(nn.Module):
    """Two independent norms, in no net of the paper nor of ours: torch's own on each half."""

    def __init__(self, args: Args) -> None:
        super().__init__()
        width, affine = args["channels"] // 2, args.get("elementwise_affine", True)
        options = {"eps": args.get("eps", 1e-5), "elementwise_affine": affine}
        self.ln_sym = nn.LayerNorm(width, bias=args.get("bias", True), **options)
        self.ln_asym = nn.LayerNorm(width, bias=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        plus, minus = x.chunk(2, dim=-1)
        return torch.cat([self.ln_sym(plus), self.ln_asym(minus)], dim=-1)


def norm_within(args: Args, channels: int) -> nn.Module:
    """The norm that a layer has by its `norm_layer`: the published nets' unless it is another."""
    kind = NormPerHalf if args["norm_layer"] == "LayerNorm2" else norm
    return kind({"channels": channels, "eps": args.get("norm_eps", 1e-5)})


def pair(value: Any) -> tuple[Any, Any]:
    return (value[0], value[1]) if isinstance(value, list | tuple) else (value, value)


def mlp(args: Args) -> nn.Module:
    width, hidden = args["in_features"], args.get("hidden_features") or args["in_features"]
    out = args.get("out_features") or width
    net = OcticMlp(width, hidden, out, group=MIRROR)
    if args.get("norm_layer") is not None:
        net.norm = norm_within(args, hidden)
    biases = pair(args.get("bias", True))
    net.fc1 = OcticLinear(width, hidden, bias=biases[0], group=MIRROR)
    net.fc2 = OcticLinear(hidden, out, bias=biases[1], group=MIRROR)
    return net


def attention(args: Args) -> nn.Module:
    fused = args.get("fused_attn", False)
    return OcticAttention(
        args["dim"],
        num_heads=args.get("num_heads", 8),
        qkv_bias=args.get("qkv_bias", False),
        qk_scale=None if fused else args.get("qk_scale"),  # which the fused reference ignores
        mixer=args.get("use_attn_mixer", False),
        group=MIRROR,
    )


def plain_attention(args: Args) -> nn.Module:
    fused = args.get("fused_attn", False)
    return Attention(
        args["dim"],
        num_heads=args.get("num_heads", 8),
        qkv_bias=args.get("qkv_bias", False),
        qk_scale=None if fused else args.get("qk_scale"),  # which the fused reference ignores
    )


def block(args: Args) -> nn.Module:
    fused = args.get("use_fused_attn", args.get("fused_attn", False))
    return OcticBlock(
        args["dim"],
        num_heads=args["num_heads"],
        mlp_ratio=args.get("mlp_ratio", 4.0),
        qkv_bias=args.get("qkv_bias", False),
        qk_scale=None if fused else args.get("qk_scale"),
        attention_mixer=args.get("use_attn_mixer", False),
        init_values=args.get("init_values", 1e-4),
        norm_eps=args.get("norm_eps", 1e-5),
        group=MIRROR,
    )


def patch_embed(c: Case) -> None:
    """Tokens in the mirrored order, or maps in the natural one; the norm before the factor."""
    args = c.args
    size = args.get("patch_size", 16)
    stem = OcticPatchEmbed(
        patch_size=size if isinstance(size, int) else tuple(size),
        in_chans=args.get("in_chans", 3),
        embed_dim=args.get("embed_dim", 768),
        bias=args.get("bias", True),
        scaled_bias=True,
        group=MIRROR,
    ).to(c.dtype)
    if args.get("norm_layer") is not None:
        stem.norm = norm_within(args, args.get("embed_dim", 768)).to(c.dtype)
    stem.load_state_dict(strip(rename_published(c.state)[0], "patch_embed."))
    x = stem(c.input())
    if args.get("norm_layer") is not None:
        x = HALF * stem.norm(x / HALF)
    module = nn.ModuleDict({"patch_embed": stem})
    if args.get("flatten", True):
        c.compare(x.flatten(1, 2)[:, mirrored_order(*x.shape[1:3])], module)
    else:
        c.compare(x.movedim(-1, 1), module, dim=1)


def flatten_and_permute(c: Case) -> None:
    order = mirrored_order(c.args["H"], c.args["W"])
    check(f"{c.name} order", order, c.state["permutation"], None, metric="exact")
    c.compare(c.input().flatten(2).transpose(1, 2)[:, order])


SAME = ("img_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio")
RATES = ("drop_rate", "attn_drop_rate", "drop_path_rate")


def options(args: Args) -> Args:
    """Our keywords for the published ones that every ViT has; patches are square."""
    found = {name: args[name] for name in (*SAME, *RATES) if name in args}
    found["img_size"] = tuple(pair(args.get("img_size", 224)))
    height, width = pair(args.get("patch_size", 16))
    if height != width:
        raise NotBuilt(f"patches of {height} x {width} in a net")
    found["patch_size"] = height
    found["qkv_bias"] = args.get("qkv_bias", False)
    found["init_values"] = args.get("init_scale", 1e-4)
    found["norm_eps"] = args.get("norm_eps", 1e-6)
    return found


def scaled(net: nn.Module, args: Args) -> nn.Module:
    """The net with the factor of the logits that a case asks for."""
    if args.get("qk_scale") is None or args.get("use_fused_attn", False):
        return net
    for block in net.blocks:
        block.attn.qk_scale = args["qk_scale"]
    return net


def mirror_vit(preset: Args) -> Callable[[Args], nn.Module]:
    def make(args: Args) -> nn.Module:
        keywords = {**preset, **options(args)}
        keywords["octic_norm_eps"] = keywords["norm_eps"]
        keywords["attention_mixer"] = args.get("use_attn_mixer", False)
        if preset is EQUIVARIANT and args.get("use_symmetrized_asym_feats", False):
            keywords["invariant"] = "power_spectrum"
        return scaled(OcticVisionTransformer(**keywords), args)

    return make


def half_of_the_blocks(preset: Args) -> Callable[[Args], nn.Module]:
    def make(args: Args) -> nn.Module:
        switch = args.get("depth", 12) // 2
        return mirror_vit({**preset, "octic_equi_break_layer": switch})(args)

    return make


def plain_block(
    args: Args, *, layer_scale: bool = True, kind: type[nn.Module] = Block
) -> nn.Module:
    fused = args.get("use_fused_attn", args.get("fused_attn", False))
    return kind(
        args["dim"],
        num_heads=args["num_heads"],
        mlp_ratio=args.get("mlp_ratio", 4.0),
        qkv_bias=args.get("qkv_bias", False),
        init_values=args.get("init_values", 1e-4) if layer_scale else None,
        norm_eps=args.get("norm_eps", 1e-5),
        qk_scale=None if fused else args.get("qk_scale"),
    )


LAYERS: dict[str, Callable[[Case], None]] = {
    "Affine2": layer(lambda a: OcticScale(a["dim"], bias=a.get("bias", True), group=MIRROR)),
    "Linear2": layer(
        lambda a: OcticLinear(
            a["input_channels"], a["output_channels"], bias=a.get("bias", True), group=MIRROR
        )
    ),
    "GELU2Module": layer(lambda a: OcticGELU(group=MIRROR)),
    "LayerNorm2v2": layer(norm),
    "LayerNorm2": layer(NormPerHalf),
    "Mlp2": layer(mlp),
    "Attention2": layer(attention),
    "WrappedAttention2": layer(attention),
    "Layer_scale_init_Block2": layer(block),
    "Attention": layer(plain_attention),
    "Layer_scale_init_Block": layer(plain_block),
    "Layer_scale_init_Block_paralx2": layer(partial(plain_block, kind=ParallelBlock)),
    "Block": layer(partial(plain_block, layer_scale=False)),
    "Block_paralx2": layer(partial(plain_block, layer_scale=False, kind=ParallelBlock)),
    "PatchEmbed2": patch_embed,
    "FlattenAndPermuteBCHWGrid": flatten_and_permute,
    "d2_vit_models": layer(mirror_vit(EQUIVARIANT)),
    "hybrid_vit_models": layer(half_of_the_blocks(HYBRID)),
    "d2_inv_early_vit_models": layer(half_of_the_blocks(INVARIANT)),
    "debug_ultra_hybrid_vit_models": layer(lambda a: scaled(HalvesViT(**options(a)), a)),
}


def run(case: Args, folder: Path) -> None:
    """Run one case in float64 and in float32, by the class that it was stored from."""
    reference = case["reference"]
    if reference["class"] == "vit_models":
        kind = HalvesAttentionViT if "hybrid" in reference["source"] else VisionTransformer
        runner = layer(lambda args: scaled(kind(**options(args)), args))
    elif reference["class"] in LAYERS:
        runner = LAYERS[reference["class"]]
    else:
        raise NotBuilt(f"no runner for the published class {reference['class']}")
    for dtype in (torch.float64, torch.float32):
        runner(Case(case, folder, dtype))


RUNNERS: dict = {}  # `flopping_cases.py` calls `run` for what it does not have
