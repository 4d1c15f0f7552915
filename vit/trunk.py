"""What every Vision Transformer of ours shares, plain or octic: tokens in, features out.

A subclass builds the layers (`patch_embed`, `blocks`, `norm`, `head`, tokens, positions) and says
how a trained token gets its D channels (`_all_channels`) and where its octic part ends (`switch`,
`transition`). Running the layers is implemented here, once. The interface is the Backbone
contract and timm's (`forward_features`, `forward_head`, `forward_intermediates`, ...).

Letters in shapes: B images, T all tokens, P prefix tokens (class and registers), N patches in a
grid of h x w, D channels.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vit.backbone import (
    Encoded,
    Features,
    check_counts,
    check_pool,
    check_whole_patches,
    sides_of,
    take_indices,
)
from vit.block import Addend, ResidualBlock, added, has_hooks, terms_of
from vit.initialisation import fresh_head
from vit.packing import Packing, pack, unpack

POOLS = ("token", "avg", "")


class Trunk(nn.Module):
    """Base of the Vision Transformers: embedding, blocks, norm, pooling, head."""

    patch_embed: nn.Module  # images [B C H W] -> [B h w D]
    cls_token: nn.Parameter | None
    register_tokens: nn.Parameter | None
    mask_token: nn.Parameter | None
    blocks: nn.ModuleList
    norm: nn.Module

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        embed_dim: int,
        depth: int,
        class_token: bool,
        num_register_tokens: int,
        drop_rate: float,
        dynamic_img_size: bool,
    ) -> None:
        super().__init__()
        check_counts(1, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, depth=depth)
        check_counts(0, num_classes=num_classes, num_register_tokens=num_register_tokens)
        self.img_size = height, width = sides_of(img_size)
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.depth = depth
        self.num_register_tokens = num_register_tokens
        self.num_prefix_tokens = int(class_token) + num_register_tokens
        self.has_class_token = class_token
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        self.global_pool = _checked_pool(global_pool, class_token)
        check_whole_patches(self.img_size, patch_size, "img_size")
        self.grid_size = (height // patch_size, width // patch_size)
        self.switch = 0  # blocks before this index are octic
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size}
            for i in range(depth)
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()

    def _make_tokens(self, channels: int, *, mask_token: bool = False) -> None:
        """Add class, register and mask tokens, as far as the model has them, without values."""
        registers = self.num_register_tokens
        self.cls_token = nn.Parameter(torch.empty(1, 1, channels)) if self.has_class_token else None
        self.register_tokens = (
            nn.Parameter(torch.empty(1, registers, channels)) if registers else None
        )
        self.mask_token = nn.Parameter(torch.empty(1, channels)) if mask_token else None

    def _init_tokens(self, cls_token_std: float) -> None:
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=cls_token_std)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        if self.mask_token is not None:
            nn.init.zeros_(self.mask_token)

    # What a subclass defines.

    def patch_positions(self, height: int, width: int) -> Tensor:
        """Position embedding of a grid of h x w patches: [1 N D]."""
        raise NotImplementedError

    def class_position(self) -> Tensor | None:
        """Position embedding of the class token [1 1 D], where the model has one."""
        return None

    def transition(self, x: Tensor) -> Tensor:
        """Convert tokens [B T D] of the octic blocks to tokens of the plain blocks."""
        return x

    def _all_channels(self, token: Tensor) -> Tensor:
        """A trained token with all D channels; octic models train its invariant part alone."""
        return token

    # Embedding.

    def embed(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Tokens [B T D] of images [B C H W]; masks [B N] mark patches to hide.

        ValueError for images or masks of another shape.
        """
        self._check_images(images)
        grid = self.patch_embed(images)
        height, width = grid.shape[1:3]
        patches = grid.flatten(1, 2)
        if masks is not None:
            if self.mask_token is None:
                raise ValueError("this model has no mask token; build it with mask_token=True")
            if masks.shape != patches.shape[:2]:
                shape = tuple(masks.shape)
                raise ValueError(
                    f"masks of shape {shape} for {len(images)} images of {height} x {width} patches"
                )
            hidden = self._all_channels(self.mask_token).to(patches.dtype)
            patches = torch.where(masks[..., None], hidden, patches)
        positions = self.patch_positions(height, width)
        if masks is None and self.mask_token is not None and torch.is_grad_enabled():
            # An unused mask token gets a gradient of zero instead of None, as timm's tests expect.
            positions = positions + 0 * self._all_channels(self.mask_token)
        patches = patches + positions
        prefix = self._prefix_tokens()
        if not prefix:
            return patches
        batch = images.shape[0]
        return torch.cat([*(token.expand(batch, -1, -1) for token in prefix), patches], dim=1)

    def _prefix_tokens(self) -> list[Tensor]:
        tokens = []
        if self.cls_token is not None:
            position, token = self.class_position(), self._all_channels(self.cls_token)
            tokens.append(token if position is None else token + position)
        if self.register_tokens is not None:
            tokens.append(self._all_channels(self.register_tokens))
        return tokens

    def _check_images(self, images: Tensor) -> None:
        height, width = images.shape[-2:]
        size = (height, width)
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(
                f"images of shape {tuple(images.shape)} for a model of {self.in_chans} channels"
            )
        if not self.dynamic_img_size and size != self.img_size:
            raise ValueError(
                f"images of {size} given to a model of {self.img_size} with dynamic_img_size=False"
            )
        check_whole_patches(size, self.patch_size)

    # Running.

    def _run(
        self, x: Tensor, packing: Packing | None = None, taps: Iterable[int] = (), stop: int = -1
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the blocks (up to `stop`, if not negative); also keep the outputs of `taps`."""
        taps, kept = set(taps), {}
        addend: Addend | None = None  # of the block before
        last = len(self.blocks) - 1 if stop < 0 else stop
        for index, block in enumerate(self.blocks[: last + 1]):
            if index == self.switch:
                x, addend = self.transition(added(x, addend)), None
            deferring = _defers_sum(block)
            arguments = (x, packing, addend, True) if deferring else (added(x, addend), packing)
            x, addend = terms_of(self._call(block, *arguments))
            if index in taps:
                x, addend = added(x, addend), None
                # The output of an octic block is returned in the basis of the plain half.
                kept[index] = self.transition(x) if index < self.switch else x
        x = added(x, addend)
        if last < self.switch:
            x = self.transition(x)
        return x, kept

    def _call(self, block: nn.Module, *arguments: Any) -> Any:
        """A block's output; under gradient checkpointing its activations are recomputed."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def run(
        self, images: Tensor, taps: Iterable[int] = (), stop: int = -1
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Tokens [B T D] after the blocks (up to `stop`, if not negative), and those of `taps`.

        The latter, [B P+N D], have a token for every patch, whatever the blocks drop.
        """
        return self._run(self.embed(images), taps=taps, stop=stop)

    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """All tokens [B T D] after the final norm."""
        return self.norm(self._run(self.embed(x, masks))[0])

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Reduce tokens [B T D] to one vector [B D] (pool type "" leaves them)."""
        asked = self.global_pool if pool_type is None else pool_type
        pool_type = _checked_pool(asked, self.has_class_token)
        if pool_type == "token":
            return x[:, 0]
        return x[:, self.num_prefix_tokens :].mean(dim=1) if pool_type == "avg" else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, drop out and classify tokens [B T D]."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Logits [B classes] of images; without classes the pooled feature [B D]."""
        return self.forward_head(self.forward_features(x, masks))

    # What recipes and probes read.

    def encode(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
    ) -> list[Encoded]:
        """Encode crops of any sizes, [Bi C Hi Wi] each, as one packed sequence; order is kept.

        masks: for each crop the patches to hide [Bi Ni], or None.
        """
        if self.cls_token is None:
            raise ValueError("encode() needs a class token; build the model with class_token=True")
        masks = [None] * len(crops) if masks is None else masks
        embedded = [self.embed(crop, mask) for crop, mask in zip(crops, masks, strict=True)]
        if len(embedded) == 1:
            prenorm = [self._run(embedded[0])[0]]
            normed = [self.norm(prenorm[0])]
        else:
            packed, packing = pack(embedded)
            out = self._run(packed, packing)[0]
            prenorm = unpack(out, packing.groups)
            normed = unpack(self.norm(out), packing.groups)
        first = self.num_prefix_tokens
        return [
            Encoded(cls=x[:, 0], registers=x[:, 1:first], patches=x[:, first:], prenorm=raw)
            for x, raw in zip(normed, prenorm, strict=True)
        ]

    def features(self, images: Tensor, layers: Sequence[int] = (-1,)) -> list[Features]:
        """Normalised features of the asked blocks (Backbone contract)."""
        indices = take_indices(layers, self.depth)
        grid = tuple(side // self.patch_size for side in images.shape[-2:])
        _, kept = self.run(images, taps=indices, stop=max(indices))
        normed = (self.norm(kept[index]) for index in indices)
        return [
            Features(
                cls=x[:, 0] if self.has_class_token else self.pool(x, "avg"),
                patches=x[:, self.num_prefix_tokens :].unflatten(1, grid),
            )
            for x in normed
        ]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Final tokens and the outputs of the asked blocks, as timm's models give them."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r} is not NCHW or NLC")
        taken = take_indices(indices, self.depth)
        grid = tuple(side // self.patch_size for side in x.shape[-2:])
        out, kept = self.run(x, taps=taken, stop=max(taken) if stop_early else -1)
        intermediates = []
        for index in taken:
            tokens = self.norm(kept[index]) if norm else kept[index]
            prefix, patches = tokens.split([self.num_prefix_tokens, grid[0] * grid[1]], dim=1)
            if output_fmt == "NCHW":
                patches = patches.unflatten(1, grid).permute(0, 3, 1, 2).contiguous()
            intermediates.append((patches, prefix) if return_prefix_tokens else patches)
        return intermediates if intermediates_only else (self.norm(out), intermediates)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Patch tokens (or pairs with the class token) of the last n or the listed blocks.

        DINOv2's spelling, in the order of the blocks: [B N D] each, or [B D h w] with `reshape`.
        """
        if return_class_token and not self.has_class_token:
            raise ValueError("return_class_token=True needs a model with class_token=True")
        found = self.forward_intermediates(
            x,
            indices=sorted(take_indices(n, self.depth)),
            return_prefix_tokens=True,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )
        if not return_class_token:
            return tuple(patches for patches, _ in found)
        return tuple((patches, prefix[:, 0]) for patches, prefix in found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks behind the last asked one; returns the asked indices (timm)."""
        taken = take_indices(indices, self.depth)
        keep = max(taken) + 1
        self.switch = min(self.switch, keep)
        self.blocks = self.blocks[:keep]
        self.depth = keep
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    # timm's housekeeping.

    def get_classifier(self) -> nn.Module:
        """The layer that gives logits."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one (0 classes: none)."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = _checked_pool(global_pool, self.has_class_token)
        self.head = fresh_head(self, self.embed_dim, num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Depth of each parameter, for layer-wise learning rates (timm)."""
        stem = r"^(?:cls_token|register_tokens|mask_token|pos_embed|patch_embed)"
        blocks = r"^blocks\.(\d+)"
        rest = (r"^(?:invariant|norm)", (99999,))
        return {"stem": stem, "blocks": blocks if coarse else [(blocks, None), rest]}

    def no_weight_decay(self) -> set[str]:
        """Names of position embeddings and class token, which DeiT does not decay."""
        return {
            name
            for name, _ in self.named_parameters()
            if name == "cls_token" or name.split(".")[0] == "pos_embed"
        }


def _defers_sum(block: nn.Module) -> bool:
    """Whether a block leaves its last sum to the next one; not with hooks, which want the sum."""
    return isinstance(block, ResidualBlock) and block.defers_sum and not has_hooks(block)


def _checked_pool(global_pool: str, class_token: bool) -> str:
    check_pool(global_pool, POOLS)
    if global_pool == "token" and not class_token:
        raise ValueError('global_pool "token" needs a class token; use "avg" without one')
    return global_pool
