"""Base of the networks of this package: a sequence of stages, a head, timm's interface.

A subclass defines how images are embedded (`embed`), its stages (`path`), and three readings of
the features: one vector for the classifier (`vector`), the same at each place (`patch_map`), and
all channels as a map (`full_map`).

Letters: B images, h w places, D channels of a feature, F channels that the classifier reads.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from utils.ranges import check_count, check_counts, check_range
from vit.backbone import Features, check_pool, sides_of, take_indices
from vit.initialisation import fresh_head, init_linear


class Stage(NamedTuple):
    """The entry of a stage, and its blocks."""

    entry: nn.Module
    blocks: Sequence[nn.Module]


class Net(nn.Module):
    """Base of the classifiers; see the module's docstring for what a subclass defines.

    Blocks are counted within the last stage in `features`, as all of these have one width; timm's
    `forward_intermediates` counts stages, or blocks where there is one stage.
    """

    norm: nn.Module

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        num_classes: int,
        dims: Sequence[int],
        depths: Sequence[int],
        num_features: int,
        drop_rate: float,
        global_pool: str,
    ) -> None:
        super().__init__()
        check_counts(1, patch_size=patch_size, in_chans=in_chans)
        check_count("depth of the last stage", depths[-1], 1)
        self.img_size = sides_of(img_size)
        self.patch_size = patch_size * 2 ** (len(depths) - 1)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = num_features
        self.depth = depths[-1]
        self.global_pool = check_pool(global_pool)
        self.grad_checkpointing = False
        self.feature_info = _feature_info(dims, depths, patch_size)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(num_features, num_classes) if num_classes > 0 else nn.Identity()
        init_linear(self.head)
        self.check_size(*self.img_size)

    # What a subclass defines.

    def embed(self, images: Tensor) -> Tensor:
        """Features of the first stage's entry."""
        raise NotImplementedError

    def path(self) -> list[Stage]:
        """The stages, in order."""
        raise NotImplementedError

    def vector(self, x: Tensor) -> Tensor:
        """What the classifier reads [B F]: pooled and normalised."""
        raise NotImplementedError

    def patch_map(self, x: Tensor) -> Tensor:
        """What the classifier reads, place by place [B h w F]."""
        raise NotImplementedError

    def full_map(self, x: Tensor) -> Tensor:
        """All channels of features as a map [B h w D]."""
        raise NotImplementedError

    def check_size(self, height: int, width: int) -> None:
        """ValueError for images that the network does not take."""
        if min(height, width) < self.patch_size:
            raise ValueError(
                f"image size {height} x {width} is below {self.patch_size}, the network's reduction"
            )

    # Running.

    def forward_features(self, x: Tensor) -> Tensor:
        """Features of the last block, before the norm."""
        x = self._embed(x)
        for stage in self.path():
            x = self._through(stage, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, normalise, drop out and classify features."""
        if self.global_pool == "":
            return x
        x = self.head_drop(self.vector(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B classes] of images; without classes the vector [B F]."""
        if self.global_pool == "":
            return self.forward_features(x)
        *earlier, last = self.path()
        x = self._embed(x)
        for stage in earlier:
            x = self._through(stage, x)
        x = self._through(Stage(last.entry, last.blocks[:-1]), x)
        return self.head(self.head_drop(self.read(last.blocks[-1], x)))

    def read(self, block: nn.Module, x: Tensor) -> Tensor:
        """What the classifier reads [B F] of the last block, given the block's input.

        A subclass may leave out parts of the block that it would not read.
        """
        return self.vector(self._through_one(block, x))

    def features(self, images: Tensor, layers: Sequence[int] = (-1,)) -> list[Features]:
        """What the classifier reads of the asked blocks of the last stage (Backbone contract)."""
        indices = take_indices(layers, self.depth)
        *earlier, last = self.path()
        x = self._embed(images)
        for stage in earlier:
            x = self._through(stage, x)
        x, kept = last.entry(x), {}
        for index in range(max(indices) + 1):
            x = self._through_one(last.blocks[index], x)
            if index in indices:
                kept[index] = x
        return [Features(self.vector(kept[i]), self.patch_map(kept[i])) for i in indices]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Final features and maps [B D h w] of the asked stages, as timm's networks give them.

        With one stage: of the asked blocks. norm: for the last stage, what the classifier reads.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r} is not NCHW")
        units = self._units()
        taken, last = take_indices(indices, len(units)), len(units) - 1
        x, maps = self._embed(x), {}
        for index, unit in enumerate(units[: max(taken) + 1] if stop_early else units):
            x = self._through(unit, x)
            if index in taken:
                normed = norm and (len(self.path()) == 1 or index == last)
                chosen = self.patch_map(x) if normed else self.full_map(x)
                maps[index] = chosen.permute(0, 3, 1, 2)
        found = [maps[index] for index in taken]
        return found if intermediates_only else (x, found)

    def _units(self) -> list[Stage]:
        """The units between two intermediates: stages, or blocks if there is only one stage."""
        path = self.path()
        if len(path) > 1:
            return path
        entry, blocks = path[0]
        return [Stage(entry if i == 0 else nn.Identity(), [b]) for i, b in enumerate(blocks)]

    def _through(self, stage: Stage, x: Tensor) -> Tensor:
        x = stage.entry(x)
        for block in stage.blocks:
            x = self._through_one(block, x)
        return x

    def _embed(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(
                f"images of shape {tuple(images.shape)} for a network of {self.in_chans} channels"
            )
        self.check_size(*images.shape[-2:])
        return self.embed(images)

    def _through_one(self, block: nn.Module, x: Tensor, **options: Any) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, **options)
        return block(x, **options)

    # timm's housekeeping.

    def get_classifier(self) -> nn.Module:
        """The layer that gives logits."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one (0 classes: none)."""
        if global_pool is not None:
            self.global_pool = check_pool(global_pool)
        self.num_classes = num_classes
        self.head = fresh_head(self, self.num_features, num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The depth of each parameter, for layer-wise learning rates (timm)."""
        if len(self.path()) == 1:
            blocks = r"^(?:blocks|stages\.0)\.(\d+)"
            rest = (r"^norm", (99999,))
            return {"stem": r"^stem", "blocks": blocks if coarse else [(blocks, None), rest]}
        if coarse:
            return {"stem": r"^(?:stem|entries\.0)", "blocks": r"^(?:stages|entries)\.(\d+)"}
        return {
            "stem": r"^(?:stem|entries\.0)",
            "blocks": [
                (r"^entries\.(\d+)", (0,)),
                (r"^stages\.(\d+)\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    def no_weight_decay(self) -> set[str]:
        """Gains and shifts that are not vectors, as in timm's `Affine`."""
        return {n for n, p in self.named_parameters() if n.endswith((".alpha", ".beta"))}


def check_drop_path(rate: float) -> None:
    """ValueError for a rate of stochastic depth that would always drop a block."""
    check_range("drop_path_rate", rate, 0, 1, ends="[)")


def _feature_info(
    dims: Sequence[int], depths: Sequence[int], patch_size: int
) -> list[dict[str, Any]]:
    if len(depths) == 1:
        module, count, widths = "blocks", depths[0], [dims[0]] * depths[0]
        reductions = [patch_size] * count
    else:
        module, count, widths = "stages", len(depths), list(dims)
        reductions = [patch_size * 2**index for index in range(count)]
    return [
        {"module": f"{module}.{i}", "num_chs": width, "reduction": reduction}
        for i, (width, reduction) in enumerate(zip(widths, reductions, strict=True))
    ]
