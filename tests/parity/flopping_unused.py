"""Layers of "Flopping for FLOPs" that none of its models uses, or only parts of one of ours.

Put together from those of `octic` and `baselines.flopping`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.flopping.activation import RegularActivation
from baselines.flopping.filters import MIRROR, HalfFilter
from baselines.flopping.resmlp import PairLinear, PairScale, TokenLinear
from octic.irrep_norm import irrep_norm
from octic.layers import OcticMlp, OcticScale
from tests.parity.flopping_case import Golden, pairs, unpaired


class PairNorm(nn.Module):
    """The norms of pairs that no published model uses: one deviation, or one for each part."""

    def __init__(
        self,
        dim: int,
        *,
        joint: bool,
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.joint, self.eps = joint, eps
        if joint:
            self.scaling = PairScale(dim, bias=bias) if affine else nn.Identity()
        else:
            options = {"eps": eps, "elementwise_affine": affine}
            self.ln_sym = nn.LayerNorm(dim // 2, bias=bias, **options)
            self.ln_asym = nn.LayerNorm(dim // 2, bias=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        if self.joint:
            segments = ((1, 1.0),) * 4
            normed = irrep_norm(x.flatten(-2), segments=segments, eps=self.eps)
            return self.scaling(normed.view(x.shape))
        x0, x1, x2, x3 = unpaired(x)
        return pairs([self.ln_sym(x0), self.ln_asym(x1), self.ln_asym(x2), self.ln_sym(x3)])


def pair_norm(joint: bool) -> Callable[[Golden], nn.Module]:
    return lambda c: PairNorm(
        c.take("channels", 0),
        joint=joint,
        eps=c.take("eps", 1e-5),
        affine=c.take("elementwise_affine", True),
        bias=c.take("bias", True),
    )


def norm_within(c: Golden, dim: int) -> nn.Module | None:
    """The norm that a layer has by its `norm_layer`: of one deviation unless it is the other."""
    name, eps = c.take("norm_layer", None), c.take("norm_eps", 1e-5)
    return None if name is None else PairNorm(dim, joint=name != "LayerNorm22", eps=eps)


class NormedPairMlp(nn.Module):
    """An MLP of pairs with a bias in either layer, or in none, and a norm between them."""

    def __init__(
        self, dim: int, hidden: int, out: int, bias: Sequence[bool], norm: nn.Module | None
    ) -> None:
        super().__init__()
        self.fc1 = PairLinear(dim, hidden, bias=bias[0])
        self.act = RegularActivation("quick_gelu", num_signs=2)
        self.norm = norm or nn.Identity()
        self.fc2 = PairLinear(hidden, out, bias=bias[1])

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        return self.fc2(self.norm(self.act(y.flatten(-2)).unflatten(-1, y.shape[-2:])))


class OldTokenMix(nn.Module):
    """`PatchLinear2`: tokens in mirrored order; its bias on the odd half breaks the law."""

    def __init__(self, num_tokens: int, *, bias: bool = True) -> None:
        super().__init__()
        self.mix = TokenLinear(num_tokens // 2, bias=False)
        self.bias = nn.Parameter(torch.empty(num_tokens // 2)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        y = self.mix(torch.stack([left + right, left - right], dim=2) / 2)
        even, odd = y.unbind(2)
        shift = 0 if self.bias is None else self.bias[:, None] / 2
        return torch.cat([even + odd + shift, even - odd + shift], dim=1)


class OldBlock(nn.Module):
    """`layers_scale_mlp_blocks2`."""

    def __init__(self, dim: int, num_tokens: int) -> None:
        super().__init__()
        self.norm1 = OcticScale(dim, bias=True, group=MIRROR)
        self.attn = OldTokenMix(num_tokens)
        self.ls1 = OcticScale(dim, group=MIRROR)
        self.norm2 = OcticScale(dim, bias=True, group=MIRROR)
        self.mlp = OcticMlp(dim, 4 * dim, group=MIRROR)
        self.ls2 = OcticScale(dim, group=MIRROR)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in state.items():
        name = name.replace("linear2.linear_sym.bias", "bias")
        name = name.replace("gamma_", "ls").replace("linear2.", "mix.")
        for part, ours in (("asym", "A2"), ("sym", "A1")):
            name = name.replace(f"linear_{part}", f"lin_{ours}").replace(
                f"alpha_{part}", f"alpha_{ours}"
            )
        found[name] = tensor
    return found


def old_mix(c: Golden) -> nn.Module:
    return OldTokenMix(c.take("num_patches_side", 0) ** 2, bias=c.take("bias", True))


def old_block(c: Golden) -> nn.Module:
    for name in ("init_values", "drop", "drop_path"):
        c.take(name, 0.0)
    return OldBlock(c.take("dim", 0), c.take("num_patches", 196))


class HalfConv(nn.Module):
    """One of our half filters in a convolution, at the root of its names."""

    def __new__(cls, *args: Any, **options: Any) -> nn.Module:  # the filter itself, with a forward
        half = HalfFilter(*args, **{k: options[k] for k in ("symmetric", "bias")})
        rest = {k: v for k, v in options.items() if k not in ("symmetric", "bias")}
        half.forward = lambda x: F.conv2d(x, half.full(), half.bias, **rest)
        return half


def half_conv(c: Golden) -> nn.Module:
    sides = c.take("out_channels", 0), c.take("in_channels", 0)
    kernel = tuple(c.take("kernel_size", (2, 2)))
    stride = c.take("stride", 1)
    return HalfConv(
        *sides, kernel, symmetric=c.take("sym", True), bias=c.take("bias", True), stride=stride
    )


def half_depthwise(c: Golden) -> nn.Module:
    count, side = c.take("channels", 0), c.take("kernel_size", 7)
    return HalfConv(
        count,
        1,
        (side, side),
        symmetric=c.take("sym", True),
        bias=c.take("bias", True),
        padding=c.take("padding", 3),
        groups=count,
    )
