"""EViT: the plain ViT of DeiT, in which some blocks keep only the most important tokens.

Liang et al. 2022. It has the same parameters as a DeiT, so weights of one fit the other.

Letters in shapes: B images, N patches in a grid of h x w, n tokens behind the class token, k of
them kept, D channels.
"""

import ast
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from baselines.evit.block import EViTBlock
from baselines.evit.reorganisation import (
    follow_origins,
    patch_indices,
    patch_mask,
    scatter_tokens,
    tokens_to_keep,
)
from baselines.evit.schedule import Shrink
from baselines.tapped import SIZES, TappedTrunk
from utils.ranges import check_counts, check_range, check_rate
from vit.vision_transformer import VisionTransformer

DROP_LOC = (3, 6, 9)
PerBlock = float | Sequence[float] | None


class EViT(TappedTrunk, VisionTransformer):
    """DeiT with token reorganisation; all other options are those of `VisionTransformer`.

    keep_rate: of each block, or one for all: the share of tokens behind the class token that it
        keeps; 1 keeps all. Instead of it, base_keep_rate: of the blocks `drop_loc`, counted from 0
        (default: those of 3, 6 and 9 that exist; text like "(3, 6, 9)" is accepted as well).
    fuse_token: dropped tokens become one more token each time, which is ranked like any other.
    shrink_start_epoch, shrink_epochs: in training the rate is 1 up to the former, and then falls
        to its value within the latter, along a cosine from max_keep_rate (`follow_training`).
    exact_counts: see `baselines.selection.keep_count`; false: as published.
    representation_size: width of a layer with tanh before the head, or none.

    Feature maps have a value for every patch: a dropped patch keeps its last value.
    Departs from EViT: drop_rate acts only before the head; oblong images are accepted, sizes that
    are no multiple of the patch refused; a distillation token, which gave garbage, is refused.
    """

    block_class = EViTBlock

    def __init__(
        self,
        *,
        keep_rate: PerBlock = None,
        base_keep_rate: float | None = None,
        drop_loc: Sequence[int] | str | None = None,
        fuse_token: bool = False,
        shrink_start_epoch: float = 0,
        shrink_epochs: float = 0,
        max_keep_rate: float = 1.0,
        exact_counts: bool = True,
        representation_size: int | None = None,
        distilled: bool = False,
        class_position: bool = True,
        drop_path_uniform: bool = False,
        **options: Any,
    ) -> None:
        if distilled:
            raise ValueError(
                "EViT has no distilled form: a distillation token could be dropped; use "
                "distilled=False, or timm's deit_*_distilled models"
            )
        if options.get("class_token", True) is False:
            raise ValueError("EViT needs its class token, whose attention tells what to keep")
        if options.get("num_register_tokens", 0):
            raise ValueError("EViT has no register tokens; baselines.token_reduction protects them")
        if options.get("mask_token", False):
            raise ValueError("EViT hides no patches: it has no mask token")
        check_counts(1, **{key: options[key] for key in SIZES if key in options})
        check_range("attn_drop_rate", options.get("attn_drop_rate", 0.0), 0, 1, ends="[)")
        super().__init__(
            class_position=class_position, drop_path_uniform=drop_path_uniform, **options
        )
        if keep_rate is not None and (base_keep_rate is not None or drop_loc is not None):
            raise ValueError("give keep_rate, or base_keep_rate and drop_loc, not both")
        if keep_rate is None:
            self.keep_rates = rates_at(base_keep_rate, drop_loc, self.depth)
        else:
            self.keep_rates = per_block(keep_rate, self.depth, "keep_rate")
            for rate in self.keep_rates:
                check_rate("keep_rate", rate)
        self.exact_counts = exact_counts
        self.shrink = Shrink(
            start_epoch=shrink_start_epoch, epochs=shrink_epochs, highest=max_keep_rate
        )
        self._training_rates: list[float] | None = None
        self.fuse_token = fuse_token
        for block in self.blocks:
            cast(EViTBlock, block).fuse_token = fuse_token
        self._add_pre_logits(representation_size)

    def follow_training(self, step: int, epoch_length: int) -> dict[str, float]:
        """Set the rates for a training step; they are used, in evaluation too, until the next call.

        The recipe calls it. A network that was never told of a training uses its own rates.
        epoch_length: in steps. Returns the lowest rate, to be shown.
        """
        self._training_rates = [
            self.shrink.rate_at(rate, step, epoch_length) if rate < 1 else 1.0
            for rate in self.keep_rates
        ]
        return {"keep_rate": min(self._training_rates)}

    def plan(
        self,
        num_patches: int,
        keep_rate: PerBlock = None,
        tokens: int | Sequence[int | None] | None = None,
    ) -> list[int | None]:
        """How many tokens after the class token each block keeps; None if it keeps all.

        keep_rate, tokens: instead of the network's own rates, for all blocks or for each; see
        `reorganisation.tokens_to_keep`.
        """
        if keep_rate is None:
            called = per_block(self._training_rates, self.depth, "keep_rate")
        else:
            called = per_block(keep_rate, self.depth, "keep_rate")
        asked = per_block(tokens, self.depth, "tokens")
        count, found = num_patches, []
        for own, rate, number in zip(self.keep_rates, called, asked, strict=True):
            kept = tokens_to_keep(count, own, rate, number, exact=self.exact_counts)
            found.append(kept if kept < count else None)
            if kept < count:
                count = kept + int(self.fuse_token)
        return found

    def token_counts(self, num_patches: int, **asked: Any) -> list[int]:
        """Numbers of tokens after the class token, after each block; keywords as of `plan`."""
        counts = [num_patches]
        for kept in self.plan(num_patches, **asked):
            counts.append(counts[-1] if kept is None else kept + int(self.fuse_token))
        return counts[1:]

    def run(
        self, images: Tensor, taps: Iterable[int] = (), stop: int = -1
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Tokens after all blocks and after `taps`, with the last values of dropped patches."""
        grid, taps = self.grid_of(images), set(taps)
        x, kept = self.embed(images), {}
        last = len(self.blocks) - 1 if stop < 0 else stop
        origins = torch.arange(grid[0] * grid[1], device=x.device).expand(len(x), -1)
        left = x[:, 1:]
        for index, number in enumerate(self.plan(grid[0] * grid[1])[: last + 1]):
            x, indices, before = self._call(self.blocks[index], x, number)
            if indices is not None and before is not None and taps:
                left = scatter_tokens(left.to(before.dtype), before[:, 1:], origins)
                origins = follow_origins(origins, indices, fuse=self.fuse_token)
            if index in taps:
                whole = scatter_tokens(left.to(x.dtype), x[:, 1:], origins)
                kept[index] = torch.cat([x[:, :1], whole], dim=1)
        return x, kept

    def kept_indices(
        self,
        images: Tensor,
        keep_rate: PerBlock = None,
        tokens: int | Sequence[int | None] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Tokens [B 1+n D] before the final norm, and what each dropping block kept [B k].

        Indices count the tokens after the class token at the input of the block; the most important
        come first, as published.
        """
        grid = self.grid_of(images)
        x, found = self.embed(images), []
        for block, number in zip(
            self.blocks, self.plan(grid[0] * grid[1], keep_rate, tokens), strict=True
        ):
            x, indices, _ = self._call(block, x, number)
            if indices is not None:
                found.append(indices)
        return x, found

    def kept_patches(self, images: Tensor) -> list[Tensor]:
        """Which patches still have their own token after each dropping block: [B h w] each."""
        # Through a call of the net, because a sharded net gathers its weights there.
        kept = patch_indices(self(images, get_idx=True)[1], fuse=self.fuse_token)
        return [patch_mask(patches, self.grid_of(images)) for patches in kept]

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        keep_rate: PerBlock = None,
        tokens: int | Sequence[int | None] | None = None,
        get_idx: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits [B classes] of images; with `get_idx` also the indices of `kept_indices`."""
        out, indices = self.kept_indices(x, keep_rate, tokens)
        logits = self.forward_head(self.norm(out))
        return (logits, indices) if get_idx else logits

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last asked one; returns the asked indices (timm)."""
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.keep_rates = self.keep_rates[: self.depth]
        if self._training_rates is not None:
            self._training_rates = self._training_rates[: self.depth]
        return taken


def rates_at(
    base_keep_rate: float | None, drop_loc: Sequence[int] | str | None, depth: int
) -> list[float]:
    """`base_keep_rate` at the blocks `drop_loc`, 1 elsewhere; ValueError for missing blocks.

    Without a rate all are 1; default blocks beyond the depth are left out.
    """
    places = read_places(drop_loc) if drop_loc is not None else None
    if places is None:
        places = [place for place in DROP_LOC if place < depth]
    beyond = [place for place in places if not 0 <= place < depth]
    if beyond:
        raise ValueError(f"drop_loc {beyond} asked of a network with blocks 0 to {depth - 1}")
    rate = 1.0 if base_keep_rate is None else base_keep_rate
    check_rate("base_keep_rate", rate)
    return [rate if index in places else 1.0 for index in range(depth)]


def read_places(drop_loc: Sequence[int] | str) -> list[int]:
    """Numbers of blocks from a list or from text like "(3, 6, 9)", which is not executed."""
    found: Any = drop_loc
    if isinstance(drop_loc, str):
        try:
            found = ast.literal_eval(drop_loc)
        except (ValueError, SyntaxError):
            raise ValueError(f"drop_loc {drop_loc!r} is no list of blocks like (3, 6, 9)") from None
    found = [found] if isinstance(found, int) else found
    if not isinstance(found, Sequence) or not all(type(place) is int for place in found):
        raise ValueError(f"drop_loc {drop_loc!r} is no list of blocks like (3, 6, 9)")
    return list(found)


def per_block(value: Any, depth: int, name: str) -> list[Any]:
    """One value for each block: a sequence of as many, or of one, or a single value for all."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * depth
    if len(value) == 1:
        return list(value) * depth
    if len(value) != depth:
        raise ValueError(f"{name} has {len(value)} entries for {depth} blocks")
    return list(value)
