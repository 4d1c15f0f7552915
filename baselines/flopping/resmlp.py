"""ResMLP whose layers are mirror-equivariant, over channels and over tokens.

Bokman et al. 2025, "Flopping for FLOPs" (`resmlp_models_equi_d2_22rep`); Touvron et al. 2021,
ResMLP. A token and its mirror image are stored as their sum and difference, so that the mirror
permutes nothing. Features [B n 2 D] contain the even and the odd part of each of the n = N/2 pairs
of tokens; the D channels of each part are again [even | odd]. A mirrored image negates what is odd
in exactly one of the two senses.

Letters: B images, N tokens, n = N/2 pairs, D channels, C = D/2 of each half.
"""

import math
from collections.abc import Mapping

import torch
from timm.layers import DropPath
from timm.models.mlp_mixer import Affine
from torch import Tensor, nn

from baselines.flopping.activation import RegularActivation
from baselines.flopping.filters import MIRROR, MirrorLift
from baselines.flopping.keys import mirror_resmlp_names
from baselines.flopping.net import Net, Stage, check_drop_path
from octic.invariants import make_invariantization
from octic.irrep_linear import irrep_linear
from octic.layers import channels_per_copy
from utils.ranges import check_word
from vit.backbone import check_whole_patches
from vit.initialisation import init_linear

POOLINGS = ("spectrum", "space")
SPECTRAL = ("trivial", "power_spectrum")


def corners(even: Tensor, odd: Tensor) -> Tensor:
    """Table [2 2 m] that adds `even` to the even-even part and `odd` to the odd-odd part, [m] each.

    Both parts are invariant, so both may have a bias.
    """
    zero = torch.zeros_like(even)
    return torch.stack([torch.stack([even, zero]), torch.stack([zero, odd])])


def invariant_parts(x: Tensor) -> Tensor:
    """The even-even and the odd-odd part [... 2 C] of features [... 2 D]."""
    return x.unflatten(-1, (2, -1)).diagonal(dim1=-3, dim2=-2).transpose(-1, -2)


class PairScale(nn.Module):
    """A factor for each channel, the same for both parts of a pair; optionally shifts.

    shift_A1 is added to the even-even part, shift_A2 to the odd-odd one.
    Departs from Flopping for FLOPs, whose layers store the shifts (`beta_sym`, `beta_asym`) but
    never add them. bias=False computes the same as the published code.
    """

    def __init__(self, dim: int, init_values: float = 1.0, *, bias: bool = False) -> None:
        super().__init__()
        copy = channels_per_copy(dim, MIRROR)
        self.alpha_A1 = nn.Parameter(torch.full((copy,), float(init_values)))
        self.alpha_A2 = nn.Parameter(torch.full((copy,), float(init_values)))
        self.shift_A1 = nn.Parameter(torch.zeros(copy)) if bias else None
        self.shift_A2 = nn.Parameter(torch.zeros(copy)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Scale (and shift) features [... 2 D]."""
        alpha = torch.cat([self.alpha_A1, self.alpha_A2])
        if self.shift_A1 is None or self.shift_A2 is None:
            return x * alpha
        return torch.addcmul(corners(self.shift_A1, self.shift_A2).flatten(1), x, alpha)


def _check(given: int, own: int, what: str, layer: str) -> None:
    # The product reads its columns by strides, so it would not notice a wrong width.
    if given != own:
        raise ValueError(f"features of {given} {what} given to a {layer} of {own}")


class PairLinear(nn.Module):
    """A matrix on the even channels and one on the odd ones, the same for both parts of a pair."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        copies = channels_per_copy(in_features, MIRROR), channels_per_copy(out_features, MIRROR)
        self.lin_A1 = nn.Linear(*copies, bias=bias)
        self.lin_A2 = nn.Linear(*copies, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map features [... 2 D] to [... 2 D']."""
        _check(x.shape[-1], self.in_features, "channels", "PairLinear")
        lines = torch.stack([self.lin_A1.weight, self.lin_A2.weight])
        y = irrep_linear(x, lines, None, None)
        if self.lin_A1.bias is None:
            return y
        return y + corners(self.lin_A1.bias, self.lin_A2.bias).flatten(1).to(y.dtype)

    def invariants(self, x: Tensor) -> Tensor:
        """Only the even-even and the odd-odd part of the result [... 2 C']."""
        even, odd = x[..., 0, :].chunk(2, dim=-1)[0], x[..., 1, :].chunk(2, dim=-1)[1]
        return torch.stack([self.lin_A1(even), self.lin_A2(odd)], dim=-2)


class TokenLinear(nn.Module):
    """A matrix over the pairs for their even parts and one for their odd ones, for all channels."""

    def __init__(self, num_pairs: int, *, bias: bool = True) -> None:
        super().__init__()
        self.num_pairs = num_pairs
        self.lin_A1 = nn.Linear(num_pairs, num_pairs, bias=bias)
        self.lin_A2 = nn.Linear(num_pairs, num_pairs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mix features [B n 2 D] over n."""
        _check(x.shape[1], self.num_pairs, "pairs", "TokenLinear")
        lines = torch.stack([self.lin_A1.weight, self.lin_A2.weight])
        y = irrep_linear(x.permute(0, 3, 2, 1).flatten(2), lines, None, None)
        y = y.unflatten(2, (2, -1))  # [B D 2 n]
        if self.lin_A1.bias is not None:
            bias = corners(self.lin_A1.bias, self.lin_A2.bias)[:, None].to(y.dtype)
            y = (y.unflatten(1, (2, -1)) + bias).flatten(1, 2)
        return y.permute(0, 3, 2, 1)


class PairMlp(nn.Module):
    """Linear, activation on the regular components of a pair, linear."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        activation: str = "quick_gelu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.fc1 = PairLinear(in_features, hidden_features, bias=bias)
        self.act = RegularActivation(activation, num_signs=2)
        self.fc2 = PairLinear(hidden_features, out_features or in_features, bias=bias)

    def forward(self, x: Tensor, invariants_only: bool = False) -> Tensor:
        """Map features [... 2 D] to features, or to their even-even and odd-odd part [... 2 C]."""
        y = self.fc1(x)
        y = self.act(y.flatten(-2)).unflatten(-1, y.shape[-2:])
        return self.fc2.invariants(y) if invariants_only else self.fc2(y)


class MirrorResMlpBlock(nn.Module):
    """x += ls1(attn(norm1 x)); x += ls2(mlp(norm2 x)), `attn` being a linear map over tokens."""

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        *,
        mlp_ratio: float = 4.0,
        init_values: float = 1e-4,
        drop_path: float = 0.0,
        activation: str = "quick_gelu",
        affine_bias: bool = True,
    ) -> None:
        super().__init__()
        self.norm1 = PairScale(dim, bias=affine_bias)
        self.attn = TokenLinear(num_tokens // 2)
        self.ls1 = PairScale(dim, init_values)
        self.norm2 = PairScale(dim, bias=affine_bias)
        self.mlp = PairMlp(dim, int(dim * mlp_ratio), activation=activation)
        self.ls2 = PairScale(dim, init_values)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, invariants_only: bool = False) -> Tensor:
        """Map features [B n 2 D] to features, or to their even-even and odd-odd part [B n 2 C]."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        branch = self.mlp(self.norm2(x), invariants_only)
        if not invariants_only:
            return x + self.drop_path(self.ls2(branch))
        alphas = torch.stack([self.ls2.alpha_A1, self.ls2.alpha_A2])
        return invariant_parts(x) + self.drop_path(branch * alphas)


def to_pairs(grid: Tensor, scale: float) -> Tensor:
    """A map [B h w D] as pairs [B n 2 D]: left + mirrored right and left - mirrored right, scaled.

    Pairs are counted row by row of the left half.
    """
    left, right = grid.unflatten(2, (2, -1)).unbind(2)
    right = right.flip(2)
    return torch.stack([left + right, left - right], dim=3).flatten(1, 2) * scale


def from_pairs(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pairs [B n 2 D] as a map [B h w D]; undoes `to_pairs` of scale sqrt(1/2)."""
    even, odd = x.unflatten(1, (grid[0], grid[1] // 2)).unbind(3)
    return torch.cat([even + odd, (even - odd).flip(2)], dim=2) * math.sqrt(0.5)


def check_own_size(size: tuple[int, ...], own: tuple[int, ...]) -> None:
    """ValueError for images of another size than the network's."""
    if size != own:
        raise ValueError(
            f"image size {size[0]} x {size[1]} given to a ResMLP of {own[0]} x {own[1]}, whose "
            "token matrices are of one size"
        )


class MirrorResMlp(Net):
    """ResMLP with f(mirrored image) = f(image); grids with an even number of columns.

    invariant: what the classifier reads of the channels, `trivial` (the even half) or
        `power_spectrum` (with the absolute odd half, `use_symmetrized_asym_feats`); see `octic`.
    pooling: spectrum, the mean over the even-even and the odd-odd parts as if they were tokens of
        the same channels (published), or space, the mean over the image.
    activation: quick_gelu (published; the plain ResMLP has gelu), gelu or gelu_tanh.
    scaled_stem: tokens enter at the scale of the plain ResMLP, a factor sqrt(1/2) below the
        published ones.
    affine_bias: whether the affine layers add their shifts; see `PairScale`.
    drop_rate: of the dropout before the classifier, not within the MLPs; see `PlainResMlp`.
    """

    # Read by the report on equivariance: the symmetries that must not change the final features.
    group = MIRROR
    switch = 0

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        init_values: float = 1e-4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        invariant: str = "trivial",
        pooling: str = "spectrum",
        activation: str = "quick_gelu",
        scaled_stem: bool = False,
        affine_bias: bool = True,
    ) -> None:
        check_drop_path(drop_path_rate)
        check_word("pooling", pooling, POOLINGS)
        if pooling == "spectrum" and invariant not in SPECTRAL:
            raise ValueError(f"pooling=spectrum goes with invariant {' or '.join(SPECTRAL)}")
        invariantization = make_invariantization(invariant, embed_dim, MIRROR)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            dims=[embed_dim],
            depths=[depth],
            num_features=invariantization.output_dim,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )
        self.grid_size = (self.img_size[0] // patch_size, self.img_size[1] // patch_size)
        self.pooling, self.invariant = pooling, invariant
        self.affine_bias = affine_bias
        # The lift's factor of sqrt(1/2) compensates the transform's, if both are as published.
        self.pair_scale = math.sqrt(0.5) if scaled_stem else 1.0
        self.stem = MirrorLift(in_chans, embed_dim, patch_size)
        self.blocks = nn.ModuleList(
            MirrorResMlpBlock(
                embed_dim,
                self.grid_size[0] * self.grid_size[1],
                mlp_ratio=mlp_ratio,
                init_values=init_values,
                drop_path=drop_path_rate,
                activation=activation,
                affine_bias=affine_bias,
            )
            for _ in range(depth)
        )
        self.invariantization = invariantization
        self.norm = Affine(invariantization.output_dim)
        self.apply(init_linear)

    def check_size(self, height: int, width: int) -> None:
        """ValueError for an image of another size than the model's, or an odd number of columns."""
        super().check_size(height, width)
        check_whole_patches((height, width), self.patch_size)
        if width // self.patch_size % 2:
            raise ValueError(
                f"image size {height} x {width} makes {width // self.patch_size} columns of "
                f"patches; a mirror-equivariant ResMLP needs an even number"
            )
        check_own_size((height, width), self.img_size)

    def path(self) -> list[Stage]:
        """One stage."""
        return [Stage(nn.Identity(), list(self.blocks))]

    def embed(self, images: Tensor) -> Tensor:
        """Images to pairs [B n 2 D]."""
        return to_pairs(self.stem(images), self.pair_scale)

    def vector(self, x: Tensor) -> Tensor:
        """What the classifier reads [B F]."""
        if self.pooling == "space":
            return self.norm(self.invariantization(self.full_map(x)).mean((1, 2))[:, None])[:, 0]
        read = invariant_parts(x).mean((1, 2))
        if self.invariant == "power_spectrum":
            parts = x.unflatten(-1, (2, -1))  # [B n 2 2 C]
            odd = (parts[:, :, 1, 0].abs().mean(1) + parts[:, :, 0, 1].abs().mean(1)) / 2
            read = torch.cat([read, odd], dim=-1)
        return self.norm(read[:, None])[:, 0]

    def read(self, block: nn.Module, x: Tensor) -> Tensor:
        """What the classifier reads; of the last block only the invariant parts if possible."""
        if self.pooling == "space" or self.invariant != "trivial":
            return super().read(block, x)
        parts = self._through_one(block, x, invariants_only=True)
        return self.norm(parts.mean((1, 2))[:, None])[:, 0]

    def patch_map(self, x: Tensor) -> Tensor:
        """The invariant channels of each place [B h w F], after the final norm."""
        flat = self.invariantization(self.full_map(x)).flatten(1, 2)
        return self.norm(flat).unflatten(1, self.grid_size)

    def full_map(self, x: Tensor) -> Tensor:
        """Features of each place [B h w D]; a mirrored image mirrors them and negates the odd."""
        return from_pairs(x, self.grid_size)

    def rename_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights in the published spelling under our names; others as they are."""
        return mirror_resmlp_names(state, affine_bias=self.affine_bias)
