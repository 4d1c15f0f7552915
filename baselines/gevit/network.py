"""GE-ViT: attention between pixels on maps over the group, as a classifier and as a Backbone.

Xu et al. 2023, "E(2)-Equivariant Vision Transformer". Letters in shapes: B images, C channels, D
width of the last block, G elements of the group, H W image, h w last map, K classes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from baselines.gevit.attention import GroupSelfAttention, LiftingSelfAttention
from baselines.gevit.block import Block
from baselines.gevit.gcnn import GCNN
from baselines.gevit.groups import MapSymmetries, PlaneGroup, get_group
from baselines.gevit.layers import Halve, initialise, make_activation, make_norm
from baselines.gevit.plan import LayerPlan, make_plan
from baselines.gevit.stems import STEMS, AlignedGCNN, PatchStem, grid_group, make_patch_stem
from baselines.gevit.weights import renamed_state
from utils.ranges import OutOfRange, check_count, check_flags, check_share, check_word
from vit.backbone import Features, check_pool, features_of_intermediates, sides_of, take_indices


class GEViT(nn.Module):
    """Images [B C H W] to logits [B K] that the symmetries of `group` do not change.

    Lifting attention, stages of attention blocks with 2 x 2 maximum pools between them, a
    classifier per pixel and element; logits are the sum over pixels, then the maximum over the
    group. For the symmetries T of the pixel grid in `group`: logits(T x) = logits(x), and every map
    obeys y(T x)[g] = T y(x)[g R(T)] (see `baselines.gevit.groups`).

    group: z2, p4, p8, p12, p16, mz2, p4m or p8m. group_table: `exact`, or `reference` for old
        checkpoints, which breaks the equivariance of p4m and p8m.
    num_channels, num_heads, block_sizes, expansion: width and heads of attention, blocks of each
        stage, and by how much a stage's first block widens. crop: pixels off each side, per block.
    window: odd side of the window a pixel attends to; None for the whole map.
    norm_between: norm and activation after each block. pool_last: a pool after the last stage too.
    stem: `none`, `patch` or `gcnn` before the lifting; stem_options: keywords of
        `make_patch_stem`, or of `GCNN` with `keep_group`, which passes its group axis to the first
        block instead of lifting again.
    allow_odd: build what is not equivariant because a pool meets an odd extent (published PCam).
    drop_path_rate: 0, since there is no stochastic depth. memory_mb, recompute: see
        `baselines.gevit.attention`.
    ValueError for settings that cannot be equivariant, unless they are asked for, and for maps
    that vanish. With one channel, RGB images are averaged over theirs.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 28,
        in_chans: int = 1,
        num_classes: int = 10,
        global_pool: str = "avg",
        group: str | PlaneGroup = "p4",
        group_table: str = "exact",
        num_channels: int = 20,
        num_heads: int = 9,
        block_sizes: Sequence[int] = (2, 3),
        expansion: int | Sequence[int] | None = 1,
        crop: int | Sequence[int] | None = 0,
        window: int | None = 5,
        norm: str = "layer",
        act: str = "swish",
        norm_between: bool = False,
        pool_last: bool = False,
        stem: str = "none",
        stem_options: Mapping[str, Any] | None = None,
        allow_odd: bool = False,
        attn_drop_rate: float = 0.1,
        value_drop_rate: float = 0.1,
        input_drop_rate: float = 0.0,
        pool_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        whitening_scale: float = math.sqrt(2),
        memory_mb: float = 64.0,
        recompute: bool = True,
    ) -> None:
        super().__init__()
        if drop_path_rate:
            raise ValueError(
                f"GE-ViT has no stochastic depth: drop_path_rate must be 0, not {drop_path_rate}"
            )
        check_count("in_chans", in_chans, 1)
        check_count("num_channels", num_channels, 1)
        for key, rate in (
            ("value_drop_rate", value_drop_rate),
            ("input_drop_rate", input_drop_rate),
            ("pool_drop_rate", pool_drop_rate),
        ):
            check_share(key, rate)
        self.plane_group = get_group(group)
        height, width = sides_of(img_size)
        self.img_size = (height, width)
        self.in_chans, self.num_classes, self.window = in_chans, num_classes, window
        self.global_pool = check_pool(global_pool)
        self.stem = _make_stem(
            stem, self.plane_group, in_chans, num_channels, dict(stem_options or {})
        )
        size, reduction = _behind(self.stem, self.img_size)
        self._attention: dict[str, Any] = {
            "attn_drop_rate": attn_drop_rate,
            "memory_mb": memory_mb,
            "recompute": recompute,
        }
        self._style: dict[str, Any] = {"norm": norm, "act": act}
        even = self.plane_group.needs_even and not allow_odd
        self.group = self._law(group_table) if even else None
        plan = make_plan(
            size=size,
            num_channels=num_channels,
            block_sizes=block_sizes,
            expansion=expansion,
            crop=crop,
            pool_last=pool_last,
            even_pools=even,
            reduction=reduction,
        )
        self.input_drop = nn.Dropout(input_drop_rate)
        self.lifting_self_attention = None
        if not isinstance(self.stem, AlignedGCNN):
            self.lifting_self_attention = self._make_lifting(num_channels, num_heads, size)
        self.lifting_normalization = make_norm(norm, num_channels)
        self.activation = make_activation(act)
        self._drop = {"value": value_drop_rate, "pool": pool_drop_rate}
        self.transformer = nn.ModuleList()
        self._ends: list[int] = []  # index in `transformer` of the last item of each block
        for blocks, pooled in zip(plan.stages, plan.pools, strict=True):
            for layer in blocks:
                self._add_block(layer, num_heads, group_table, norm_between)
            if pooled:
                self._add_pool(even=even)
        self._describe([layer for blocks in plan.stages for layer in blocks])
        self.head = self._make_head(num_classes)
        self.whitening_scale = whitening_scale
        initialise(self, whitening_scale)

    # Read by reports of equivariance: empty if the settings break the law.

    @property
    def invariant(self) -> bool:
        """Whether logits, and pooled features, do not change when the image turns."""
        return self.group is not None

    @property
    def switch(self) -> int:
        """Blocks whose maps turn with the image."""
        return self.depth if self.invariant else 0

    def _law(self, group_table: str) -> MapSymmetries | None:
        group = self.plane_group
        exact = (group.relations(group_table) == group.relations("exact")).all()
        return MapSymmetries(group.grid_elements) if exact else None

    # Building.

    def _make_lifting(
        self, num_channels: int, num_heads: int, size: tuple[int, int]
    ) -> LiftingSelfAttention:
        if num_channels // 2 % 2 or num_channels < 4:
            raise ValueError(
                f"num_channels must be a multiple of 4, or 1 more, not {num_channels}: half of "
                "them are a lifting head's, half of these for rows and half for columns"
            )
        in_channels = self.in_chans if self.stem is None else self.stem.num_channels
        return LiftingSelfAttention(
            self.plane_group,
            in_channels,
            num_channels // 2,
            num_channels,
            num_heads,
            **self._where(size),
            **self._attention,
        )

    def _add_block(
        self, layer: LayerPlan, num_heads: int, group_table: str, norm_between: bool
    ) -> None:
        block = Block(
            self.plane_group,
            layer.in_channels,
            layer.out_channels,
            num_heads,
            crop=layer.crop,
            value_drop_rate=self._drop["value"],
            group_table=group_table,
            **self._where(layer.size),
            **self._style,
            **self._attention,
        )
        self.transformer.append(block)
        if norm_between:
            self.transformer.append(make_norm(self._style["norm"], layer.out_channels))
            self.transformer.append(make_activation(self._style["act"]))
        self._ends.append(len(self.transformer) - 1)

    def _add_pool(self, *, even: bool) -> None:
        self.transformer.append(Halve(even=even))
        if self._drop["pool"]:
            self.transformer.append(nn.Dropout(self._drop["pool"]))

    def _describe(self, layers: Sequence[LayerPlan]) -> None:
        """Say what the blocks give, as timm and the Backbone contract ask."""
        self.depth = len(layers)
        self.embed_dim = self.num_features = self.head_hidden_size = layers[-1].out_channels
        self.patch_size = layers[-1].reduction
        self.feature_info = [
            {
                "module": f"transformer.{end}",
                "num_chs": layer.out_channels,
                "reduction": layer.reduction,
            }
            for layer, end in zip(layers, self._ends, strict=True)
        ]

    def _where(self, size: tuple[int, int]) -> dict[str, Any]:
        """The window, or the side of the map to attend to as a whole."""
        if self.window:
            return {"window": self.window}
        if size[0] != size[1]:
            raise ValueError(
                f"global attention needs square maps, not {size[0]} x {size[1]}; give a window"
            )
        return {"map_size": size[0]}

    def _make_head(self, num_classes: int) -> nn.Module:
        if num_classes < 1:
            return nn.Identity()
        return nn.Conv3d(self.embed_dim, num_classes, 1, bias=False)

    # Running.

    def lift(self, images: Tensor) -> Tensor:
        """Maps on the group [B C G H W], before the first norm."""
        # No set: a tracer makes shapes tensors, which equal numbers but do not hash like them.
        known = (self.in_chans, 3) if self.in_chans == 1 else (self.in_chans,)
        if images.ndim != 4 or images.shape[1] not in known:
            raise ValueError(
                f"images of shape {tuple(images.shape)} for a model of {self.in_chans} channels"
            )
        if images.shape[1] != self.in_chans:
            images = images.mean(dim=1, keepdim=True)
        x = self.input_drop(images)
        if self.stem is not None:
            x = self.stem(x)
        return x if self.lifting_self_attention is None else self.lifting_self_attention(x)

    def trace(self, images: Tensor, stop: int | None = None) -> tuple[Tensor, dict[int, Tensor]]:
        """The last map, and the map after each item of `transformer`, up to item `stop`."""
        x = self.activation(self.lifting_normalization(self.lift(images)))
        kept = {}
        for index, layer in enumerate(self.transformer[: None if stop is None else stop + 1]):
            x = kept[index] = layer(x)
        return x, kept

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map [B D G h w]."""
        return self.trace(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B K] of the last map; without classes, or pre_logits, its mean [B D]."""
        if pre_logits or self.num_classes < 1:
            return x.mean(dim=(2, 3, 4)) if self.global_pool else x
        # The classifier is linear and has no bias, so it may follow the sum over pixels.
        summed = x.sum(dim=(-2, -1), keepdim=True)
        return self.head(summed).flatten(2).amax(dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B K] of images; without classes the mean feature [B D]."""
        return self.forward_head(self.forward_features(x))

    def features(self, images: Tensor, layers: Sequence[int] = (-1,)) -> list[Features]:
        """Maps of the asked blocks averaged over the group, and their mean (Backbone contract).

        The mean [B D] is invariant, the map [B h w D] turns with the image. With crops the map is
        that of the middle of the image.
        """
        return features_of_intermediates(self, images, take_indices(layers, self.depth))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The last map and those of the asked blocks averaged over the group [B D h w] (timm)."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r} is not NCHW")
        taken = take_indices(indices, self.depth)
        stop = self._ends[max(taken)] if stop_early or intermediates_only else None
        last, kept = self.trace(x, stop)
        maps = [kept[self._ends[index]].mean(dim=2) for index in taken]
        return maps if intermediates_only else (last, maps)

    # timm's housekeeping, and weights.

    def rename_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Published weights under our names; ValueError where the file contradicts the settings."""
        return renamed_state(state, self)

    def get_classifier(self) -> nn.Module:
        """The layer that gives logits per pixel and element."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one (0 classes: none; then global_pool "" keeps the map)."""
        if global_pool is not None:
            self.global_pool = check_pool(global_pool)
        self.num_classes = num_classes
        reference = next(self.parameters())
        self.head = self._make_head(num_classes).to(reference.device, reference.dtype)
        initialise(self.head, self.whitening_scale)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute scores in the backward pass instead of keeping them (on by default)."""
        for module in self.modules():
            if isinstance(module, LiftingSelfAttention | GroupSelfAttention):
                module.recompute = enable

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop everything after the last asked block; returns the asked indices (timm)."""
        taken = take_indices(indices, self.depth)
        self.depth = max(taken) + 1
        self.transformer = self.transformer[: self._ends[self.depth - 1] + 1]
        self._ends = self._ends[: self.depth]
        last: Any = self.feature_info[self.depth - 1]
        self.embed_dim = self.num_features = last["num_chs"]
        self.patch_size = last["reduction"]
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The depth of each parameter, for layer-wise learning rates (timm)."""
        return {"stem": r"^(?:stem|lifting)", "blocks": r"^transformer\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        """Nothing beyond what a recipe exempts anyway."""
        return set()


def _make_stem(
    stem: str, group: PlaneGroup, in_chans: int, num_channels: int, options: dict[str, Any]
) -> PatchStem | GCNN | None:
    check_word("stem", stem, STEMS)
    if stem == "none":
        if options:
            raise ValueError(f"stem_options {', '.join(options)} go with stem=patch or stem=gcnn")
        return None
    keep = stem == "gcnn" and options.pop("keep_group", False)
    if stem == "gcnn" and not options.get("pool_group", True):
        raise ValueError("stem_options: keep_group=true keeps the group's axis, not pool_group")
    if keep and options.get("out_channels", num_channels) != num_channels:
        raise ValueError(
            f"with keep_group the stem's out_channels, {options['out_channels']}, must be "
            f"num_channels, {num_channels}"
        )
    try:
        check_flags(keep_group=keep)
        if stem == "patch":
            return make_patch_stem(group, in_chans, **options)
        if keep:
            return AlignedGCNN(group, in_chans, **{"out_channels": num_channels, **options})
        return GCNN(in_chans, **{"group": grid_group(group), **options})
    except OutOfRange as error:
        raise OutOfRange(f"stem_options.{error}") from error
    except TypeError as error:
        raise ValueError(f"stem_options of stem={stem}: {error}") from None


def _behind(stem: PatchStem | GCNN | None, size: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """Size of the map after a stem, and the number of pixels per step on it."""
    if stem is None:
        return size, 1
    behind = stem.map_size(*size)
    return behind, max(1, size[0] // behind[0])
