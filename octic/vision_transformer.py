"""Octic Vision Transformers: hybrid, invariant and fully equivariant, for any pixel-grid group.

Blocks before `octic_equi_break_layer` are equivariant. There the features turn into ordinary ones:
as they are (hybrid), or made invariant and projected (invariant). Nordstrom et al. 2025. A net
whose blocks are all equivariant can instead be made invariant for its classifier alone (Bokman et
al. 2025, "Flopping for FLOPs").
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octic.actions import ToRegular
from octic.block import OcticBlock
from octic.expansion import slab_size, slots
from octic.groups import Group, get_group
from octic.invariants import (
    Invariantization,
    InvariantNorm,
    detect_invariantization,
    make_invariantization,
)
from octic.layers import channels_per_copy
from octic.patch_embed import OcticPatchEmbed, Unfold
from vit.backbone import check_counts
from vit.block import Block
from vit.initialisation import init_linear
from vit.stochastic_depth import drop_path_rates
from vit.trunk import Trunk
from vit.vision_transformer import resample_grid

BASES = ("isotypic", "regular")
PLACES = ("switch", "head")


class OcticVisionTransformer(Trunk):
    """ViT whose first blocks are equivariant to a symmetry group of the pixel grid.

    invariant: False (hybrid), True (power spectrum), the name of an invariantization, or what
        builds one of yours, called with (dim, group=group); then forward(g image) = forward(image)
        for every element g.
    invariant_at: "switch", before the plain blocks; or "head": every block is octic, and what the
        classifier and the probes read are invariants of the normalised tokens, `embed_dim` wide.
    invariant_proj: whether invariants at the switch are projected; without, they must be D wide.
    octic_equi_break_layer: number of octic blocks, 0 to depth; None is half of them (all of them
        with invariant_at "head").
    switch_basis: what a hybrid's plain half sees, "isotypic" (octic-vits) or "regular" (flopping).
    attention_mixer: trained weights of the irreps in the logits of octic blocks.
    scaled_patch_bias: see `octic.patch_embed.OcticLift`.
    pos_embed_std: deviation of the stored positions. Under D4 a cell of A1 to B2 is a sum of two.
    Square grids for groups with quarter turns; at other resolutions the unfolded positions are
    resampled, oblong ones too.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = 1e-4,
        invariant: bool | str | Callable[..., Invariantization] = False,
        invariant_at: str = "switch",
        invariant_proj: bool = True,
        octic_equi_break_layer: int | None = None,
        group: str | Group = "D4",
        switch_basis: str = "isotypic",
        irrep_weights: Mapping[str, float] | None = None,
        attention_mixer: bool = False,
        scaled_patch_bias: bool = False,
        class_token: bool = True,
        num_register_tokens: int = 0,
        mask_token: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = True,
        drop_path_mode: str = "sample",
        norm_eps: float = 1e-6,
        octic_norm_eps: float = 1e-5,
        cls_token_std: float = 0.16,
        pos_embed_std: float = 0.16 * math.sqrt(0.5),
        dynamic_img_size: bool = True,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=depth,
            class_token=class_token,
            num_register_tokens=num_register_tokens,
            drop_rate=drop_rate,
            dynamic_img_size=dynamic_img_size,
        )
        self.group = get_group(group)
        self.published_order = self.group.published_order
        self.cls_token_std, self.pos_embed_std = cls_token_std, pos_embed_std
        self.switch = _checked_switch(octic_equi_break_layer, depth, invariant_at)
        self.token_dim = embed_dim
        self.copy_dim = channels_per_copy(embed_dim, self.group)
        self.patch_embed = OcticPatchEmbed(
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            scaled_bias=scaled_patch_bias,
            group=self.group,
        )
        self._check_grid()
        self._make_positions()
        self._make_tokens(self.copy_dim, mask_token=mask_token)
        rates = drop_path_rates(drop_path_rate, depth, drop_path_uniform)
        shared: dict[str, Any] = {
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "init_values": init_values,
            "attn_drop": attn_drop_rate,
            "drop_path_mode": drop_path_mode,
            "attention_backend": attention_backend,
        }
        norm: dict[str, Any] = {"irrep_weights": irrep_weights, "group": self.group}
        self._norm_options = {**norm, "eps": octic_norm_eps}
        octic = {**norm, "norm_eps": octic_norm_eps, "attention_mixer": attention_mixer}
        self.blocks = nn.ModuleList(
            OcticBlock(embed_dim, drop_path_rate=rate, **shared, **octic)
            if index < self.switch
            else Block(embed_dim, drop_path_rate=rate, norm_eps=norm_eps, **shared)
            for index, rate in enumerate(rates)
        )
        self.invariant_at, self.has_invariant_proj = invariant_at, invariant_proj
        self._make_transition(invariant, switch_basis)
        if invariant_at == "switch":
            self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.init_weights()

    def _make_positions(self) -> None:
        self.unfold_positions = Unfold(*self.grid_size, scaled=False, group=self.group)
        slab = self.unfold_positions.slab
        self.pos_embed = nn.ParameterList(
            torch.empty(*slab, self.copy_dim) for _ in range(len(slots(self.group)))
        )

    def _check_grid(self) -> None:
        try:
            slab_size(self.group, *self.grid_size)
        except ValueError as error:
            raise ValueError(
                f"img_size {self.img_size} in patches of {self.patch_size}: {error} patches"
            ) from None

    def _make_transition(
        self, invariant: bool | str | Callable[..., Invariantization], switch_basis: str
    ) -> None:
        if switch_basis not in BASES:
            raise ValueError(f"unknown switch_basis {switch_basis!r}; known: {', '.join(BASES)}")
        name = "power_spectrum" if invariant is True else invariant
        self.invariantization: nn.Module | None = None
        self.invariant_proj: nn.Linear | None = None
        self.invariant = name or False
        self.switch_basis = switch_basis
        self.to_regular = ToRegular(self.group) if switch_basis == "regular" else None
        if self.invariant_at == "head":
            self._make_invariant_head(name or "trivial")
        elif name:
            self.invariantization = make_invariantization(name, self.token_dim, self.group)
            width = self.invariantization.output_dim
            if self.has_invariant_proj:
                self.invariant_proj = nn.Linear(width, self.token_dim)
            elif width != self.token_dim:
                raise ValueError(
                    f"invariant_proj=False needs invariants of {self.token_dim} channels, the "
                    f"width of the blocks; {type(self.invariantization).__name__} has {width}"
                )

    def _make_invariant_head(self, name: str | Callable[..., Invariantization]) -> None:
        """Norm, head and widths of a net whose blocks are all equivariant."""
        self.invariant = name
        self.norm = InvariantNorm(self.token_dim, invariant=name, **self._norm_options)
        self.embed_dim = self.num_features = self.head_hidden_size = self.norm.output_dim
        self.reset_classifier(self.num_classes)

    def transition(self, x: Tensor) -> Tensor:
        """Features [B T D] of the octic half to the plain half's tokens [B T D]."""
        if self.invariant_at == "head":
            return x
        if self.invariantization is not None:
            x = self.invariantization(x)
            return x if self.invariant_proj is None else self.invariant_proj(x)
        if self.to_regular is not None:
            return self.to_regular(x)
        parts = x.unflatten(-1, (self.group.order, -1))
        return torch.cat([parts[..., index, :] for index in self.published_order], dim=-1)

    def adapt_to(self, state: Mapping[str, Tensor]) -> None:
        """Take the invariantization that published weights were trained with, by their shape.

        The released DeiT III code builds the power spectrum for files that hold polynomials. Where
        the classifier reads the invariants, its width tells which. Two with the same width cannot
        be told apart: the model's own then stays, and so does one without a name.
        """
        if not isinstance(self.invariant, str):
            return
        if self.invariant_at == "head":
            name = self._invariants_of_head(state)
        else:
            own = self.invariant
            name = detect_invariantization(state, self.embed_dim, group=self.group, own=own)
        if name and name != self.invariant:
            reference = self.cls_token if self.cls_token is not None else self.pos_embed[0]
            self._make_transition(name, self.switch_basis)
            self.to(reference.device, reference.dtype)

    def _invariants_of_head(self, state: Mapping[str, Tensor]) -> str | None:
        """Trivial part or power spectrum, by the classifier's width; None where neither."""
        heads = [t for name, t in state.items() if name.split(".")[-2:] == ["head", "weight"]]
        if len(heads) != 1 or heads[0].ndim != 2 or heads[0].shape[1] == self.embed_dim:
            return None
        copies = sum(irrep.copies for irrep in self.group.irreps)
        names = {self.copy_dim: "trivial", copies * self.copy_dim: "power_spectrum"}
        return names.get(heads[0].shape[1])

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Depth of each parameter (timm); the invariant projection counts with the octic half."""
        matcher = super().group_matcher(coarse)
        if not coarse:
            last_octic = max(0, self.switch - 1)
            matcher["blocks"] = [(r"^invariant", (last_octic,)), *matcher["blocks"]]
        return matcher

    def init_weights(self) -> None:
        """Initialise linear layers, positions and tokens as octic-vits; keep filters and scales."""
        self.apply(init_linear)
        for parameter in self.pos_embed:
            if self.pos_embed_std:  # torch divides by it
                nn.init.trunc_normal_(parameter, std=self.pos_embed_std)
            else:
                nn.init.zeros_(parameter)
        self._init_tokens(self.cls_token_std)

    def position_grid(self) -> Tensor:
        """Unfolded positions [1 h w D] of the model's own grid; an equivariant field."""
        slabs = torch.stack(tuple(self.pos_embed)).flatten(1, 2).transpose(1, 2)  # [S C slab]
        full = self.unfold_positions(slabs)  # [G C h w]
        return full.flatten(0, 1).permute(1, 2, 0)[None]

    def patch_positions(self, height: int, width: int) -> Tensor:
        """Positions [1 N D] of a h x w grid, resampled where it is another grid."""
        grid = self.position_grid()
        if (height, width) != self.grid_size:
            grid = resample_grid(grid, (height, width))
        return grid.flatten(1, 2)

    def resize_positions(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Positions `pos_embed.k` of another grid, as slabs of this model's grid.

        Unfolded, resampled and folded again, so that the model computes what the other one does at
        this resolution, and stays equivariant.
        """
        names = [f"pos_embed.{index}" for index in range(len(slots(self.group)))]
        slabs = torch.stack([state[name] for name in names])  # [S h w C]
        own = self.unfold_positions.slab
        height, width = (
            side * whole // part
            for side, whole, part in zip(slabs.shape[1:3], self.grid_size, own, strict=True)
        )
        unfold = Unfold(height, width, scaled=False, group=self.group)
        full = unfold(slabs.double().permute(0, 3, 1, 2))  # [G C h w]
        grid = resample_grid(full.flatten(0, 1).permute(1, 2, 0)[None], self.grid_size)
        full = grid[0].permute(2, 0, 1).unflatten(0, (self.group.order, -1))
        unfold = Unfold(*self.grid_size, scaled=False, group=self.group)
        folded = unfold.fold(full).permute(0, 2, 3, 1)
        return dict(zip(names, folded.to(slabs.dtype).unbind(), strict=True))

    def _all_channels(self, token: Tensor) -> Tensor:
        # Tokens are invariant: they have channels in the trivial irrep alone, which comes first.
        return F.pad(token, (0, self.token_dim - self.copy_dim))

    def octic_features(self, images: Tensor, num_blocks: int | None = None) -> Tensor:
        """Feature tokens [B T D] after the first octic blocks (all of them by default).

        octic_features(g image) = `octic.actions.act_on_tokens` of octic_features(image).
        """
        num_blocks = self.switch if num_blocks is None else num_blocks
        if not 0 <= num_blocks <= self.switch:
            raise ValueError(f"{num_blocks} octic blocks asked of a model with {self.switch}")
        x = self.embed(images)
        for block in self.blocks[:num_blocks]:
            x = block(x)
        return x


def _checked_switch(index: int | None, depth: int, invariant_at: str) -> int:
    if invariant_at not in PLACES:
        raise ValueError(f"unknown invariant_at {invariant_at!r}; known: {', '.join(PLACES)}")
    if invariant_at == "head":
        if index not in (None, depth):
            raise ValueError(
                f'invariant_at "head" makes all {depth} blocks octic; octic_equi_break_layer '
                f"{index} must be left out"
            )
        return depth
    if index is None:
        if depth % 2:
            raise ValueError(
                f"depth {depth} is odd: half of the blocks octic is the default; "
                "give octic_equi_break_layer"
            )
        return depth // 2
    check_counts(0, octic_equi_break_layer=index)
    if index > depth:
        raise ValueError(f"octic_equi_break_layer {index} is not in 0 .. depth = {depth}")
    return index
