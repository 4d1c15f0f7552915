"""Networks whose blocks a reducer may enter: timm's ViTs, our trunks, the plain half of a hybrid.

A host owns the loop over the blocks. A block in which the reducer has nothing to do runs unchanged.
A block that the reducer works inside is run step by step: norm1, qkv (with q/k norm), the reducer's
attention, projection, layer scale, stochastic depth, the reducer's `after_attention`, then the MLP
branch. Octic blocks always run unchanged.

Letters in shapes: B images, T tokens, P prefix tokens, N patches, H heads, d channels of a head, D
channels, M tokens that are kept.
"""

from collections.abc import Iterable
from typing import Any

import torch
from timm.layers.attention import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from baselines.selection import rows_of
from baselines.token_reduction.reducer import Facts, Reducer, State
from vit.attention import Attention
from vit.block import Block
from vit.stochastic_depth import drop_path, kept_of
from vit.trunk import Trunk

POOLS = ("token", "avg", "")


class Host:
    """A network seen block by block."""

    net: Any
    facts: Facts

    def embed(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Tokens [B T D] as they enter the first block."""
        raise NotImplementedError

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        raise NotImplementedError

    def transition(self, x: Tensor) -> Tensor:
        """What happens between the octic and the plain blocks."""
        return x

    def queries_keys_values(self, attn: Any, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three times [B H T d] of normed tokens y [B T D]."""
        raise NotImplementedError

    def project(self, attn: Any, out: Tensor, y: Tensor) -> Tensor:
        """Attention output [B H M d] to the update [B M D]; y are the M tokens' normed values."""
        raise NotImplementedError

    def keep(self, block: Any, branch: int, update: Tensor, dtype: torch.dtype) -> Tensor:
        """The update [B M D] of branch 1 or 2 under the block's stochastic depth.

        dtype: of the tokens that it is added to.
        """
        raise NotImplementedError

    def attn_drop(self, block: Any) -> float:
        """Dropout of the block's attention weights, whatever its mode."""
        raise NotImplementedError

    def classless(self, x: Tensor) -> Tensor:
        """Replacement for the class token of normed tokens [B T D] in a network without one.

        Mean of the patches, as `vit.adapters.TimmBackbone` and `vit.trunk.Trunk.features` give it.
        """
        return x[:, self.facts.num_prefix :].mean(dim=1)

    # The loop.

    def run(
        self,
        x: Tensor,
        state: State,
        reducer: Reducer,
        taps: Iterable[int] = (),
        stop: int = -1,
    ) -> tuple[Tensor, State, dict[int, Tensor]]:
        """Run the blocks up to `stop` (all, if negative) on embedded tokens [B T D].

        Returns the tokens that are left, the state, and the tokens of `taps` at full resolution.
        """
        taps, kept, first = set(taps), {}, self.facts.first
        last = self.facts.depth - 1 if stop < 0 else stop
        recompute = self.net.grad_checkpointing and torch.is_grad_enabled()
        for index, block in enumerate(self.net.blocks[: last + 1]):
            if index < first:
                x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            else:
                if index == first:
                    x = self.transition(x) if first else x
                    reducer.start(state, x)
                if recompute:
                    # Hooks change the state: a second run must find it as the first one did.
                    x, state = checkpoint(
                        self._step, index, x, state.copied(), reducer, use_reentrant=False
                    )
                else:
                    x = self._inside(block, index, x, state, reducer)
            if state.record is not None:
                state.note(f"block{index}.first_token", x[:, 0])
                state.note(f"block{index}.num_tokens", torch.tensor(x.shape[1]))
                if state.origin is not None:
                    state.note(f"block{index}.origin", state.origin)
            if index in taps:
                kept[index] = self.transition(x) if index < first else reducer.restore(state, x)
        if last < first:
            x = self.transition(x)
        return x, state, kept

    def _step(self, index: int, x: Tensor, state: State, reducer: Reducer) -> tuple[Tensor, State]:
        state = state.copied()
        return self._inside(self.net.blocks[index], index, x, state, reducer), state

    def _inside(
        self, block: nn.Module, index: int, x: Tensor, state: State, reducer: Reducer
    ) -> Tensor:
        x = reducer.before_block(state, index, x)
        watched = reducer.watches and state.record is not None
        opened = watched or reducer.works_inside(index)
        x = self._opened(block, index, x, state, reducer) if opened else block(x)
        return reducer.after_block(state, index, x)

    def _opened(self, block: Any, index: int, x: Tensor, state: State, reducer: Reducer) -> Tensor:
        state.attn_drop = self.attn_drop(block) if block.training else 0.0
        normed = block.norm1(x)
        q, k, v = self.queries_keys_values(block.attn, normed)
        attended = reducer.attend(state, index, q, k, v, normed)
        if attended.rows is not None:
            x, normed = rows_of(x, attended.rows), rows_of(normed, attended.rows)
        update = block.ls1(self.project(block.attn, attended.out, normed))
        residual = x if attended.residual is None else attended.residual
        x = residual + self.keep(block, 1, update, residual.dtype)
        x = reducer.after_attention(state, index, x, attended, k)
        return x + self.keep(block, 2, block.ls2(block.mlp(block.norm2(x))), x.dtype)

    # The end of the network.

    def classify(self, x: Tensor, weights: Tensor | None) -> Any:
        """Logits of normed tokens [B T D]; weights [B T-P] of the patch tokens in their mean.

        None: as the network itself pools them.
        """
        if weights is None or self.net.global_pool != "avg":
            return self.net.forward_head(x)
        first = self.facts.num_prefix
        weights = weights.to(torch.promote_types(x.dtype, torch.float32))
        shares = weights / weights.sum(dim=1, keepdim=True)
        mean = (x[:, first:] * shares[..., None].to(x.dtype)).sum(dim=1, keepdim=True)
        # The mean of one token is that token: the network's own head does the rest.
        return self.net.forward_head(torch.cat([x[:, :first], mean], dim=1))


class TimmHost(Host):
    """timm's `VisionTransformer` in all its variants with plain blocks."""

    def __init__(self, net: TimmVisionTransformer) -> None:
        name = type(net).__name__
        odd = sorted(
            {type(b).__name__ for b in net.blocks if type(b) is not TimmBlock}
            | {type(b.attn).__name__ for b in net.blocks if type(b.attn) is not TimmAttention}
        )
        if odd:
            raise ValueError(f"blocks of timm's {name} with {', '.join(odd)} cannot be opened")
        if net.global_pool not in POOLS or getattr(net, "pool_include_prefix", False):
            raise ValueError(
                f"global_pool {net.global_pool!r} of timm's {name} reads a fixed set of tokens; "
                'reduced nets pool by "token" or "avg"'
            )
        if not isinstance(net.patch_drop, nn.Identity):
            raise ValueError(f"patch_drop_rate of timm's {name} breaks the grid of patches; give 0")
        self.net = net
        self.facts = Facts(
            depth=len(net.blocks),
            first=0,
            num_prefix=net.num_prefix_tokens,
            has_class_token=net.cls_token is not None,
            head_dim=net.blocks[0].attn.head_dim,
        )

    def embed(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Tokens [B T D] as they enter the first block."""
        if masks is not None:
            raise ValueError(f"timm's {type(self.net).__name__} has no mask token")
        return self.net.norm_pre(self.net._pos_embed(self.net.patch_embed(images)))

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.net.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
        return int(height), int(width)

    def queries_keys_values(self, attn: Any, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three times [B H T d] of normed tokens y [B T D]."""
        batch, tokens, _ = y.shape
        parts = attn.qkv(y).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        return attn.q_norm(q), attn.k_norm(k), v

    def project(self, attn: Any, out: Tensor, y: Tensor) -> Tensor:
        """Attention output [B H M d] to the update [B M D]; y are the M tokens' normed values."""
        out = attn.norm(out.transpose(1, 2).flatten(2))
        if attn.gate is not None:
            out = out * attn.gate(y).sigmoid()
        return attn.proj_drop(attn.proj(out))

    def keep(self, block: Any, branch: int, update: Tensor, dtype: torch.dtype) -> Tensor:
        """The update [B M D] of branch 1 or 2 under the block's stochastic depth."""
        return block.drop_path1(update) if branch == 1 else block.drop_path2(update)

    def attn_drop(self, block: Any) -> float:
        """Dropout of the block's attention weights, whatever its mode."""
        return block.attn.attn_drop.p


class TrunkHost(Host):
    """Our trunks: plain ViTs, DINOv2's with mask token and registers, octic hybrids."""

    def __init__(self, net: Trunk) -> None:
        first = net.switch
        if first >= net.depth:
            raise ValueError(
                f"all {net.depth} blocks of {type(net).__name__} are octic: tokens can only be "
                "reduced in plain blocks (octic_equi_break_layer below the depth)"
            )
        blocks: list[Any] = list(net.blocks[first:])
        odd = {type(b.attn).__name__ for b in blocks if type(b.attn) is not Attention}
        odd |= {type(b).__name__ for b in blocks if type(b) is not Block}
        if odd:
            raise ValueError(f"blocks with {', '.join(sorted(odd))} cannot be opened")
        self.net = net
        self.facts = Facts(
            depth=net.depth,
            first=first,
            num_prefix=net.num_prefix_tokens,
            has_class_token=net.has_class_token,
            head_dim=blocks[0].attn.qkv.in_features // blocks[0].attn.num_heads,
        )

    def embed(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Tokens [B T D] as they enter the first block; masks [B N] mark patches to hide."""
        return self.net.embed(images, masks)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = images.shape[-2:]
        return height // self.net.patch_size, width // self.net.patch_size

    def transition(self, x: Tensor) -> Tensor:
        """What happens between the octic and the plain blocks."""
        return self.net.transition(x)

    def queries_keys_values(self, attn: Any, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three times [B H T d] of normed tokens y [B T D]."""
        q, k, v = attn.queries_keys_values(y)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def project(self, attn: Any, out: Tensor, y: Tensor) -> Tensor:
        """Attention output [B H M d] to the update [B M D]."""
        return attn.proj(out.transpose(1, 2).flatten(2))

    def keep(self, block: Any, branch: int, update: Tensor, dtype: torch.dtype) -> Tensor:
        """The update [B M D] under the block's stochastic depth.

        Mode `subset` draws its sequences as the block does, but computes all of them: what the
        reducer has stored about the others must stay valid.
        """
        rate = block.drop_path_rate if block.training else 0.0
        if rate == 0.0 or block.drop_path_mode == "sample":
            return drop_path(update, None, rate, dtype=dtype)
        count, kept = len(update), kept_of(len(update), 1.0 - rate)
        chosen = torch.randperm(count, device=update.device)[:kept]
        share = update.new_zeros(count, dtype=dtype).index_fill(0, chosen, count / max(1, kept))
        return update * share[:, None, None]

    def attn_drop(self, block: Any) -> float:
        """Dropout of the block's attention weights, whatever its mode."""
        return block.attn.attn_drop


def find_host(model: nn.Module) -> Host:
    """The host of a network, or of the one in its adapter; ValueError if there is none."""
    net = getattr(model, "net", model)
    if isinstance(net, Trunk):
        return TrunkHost(net)
    if isinstance(net, TimmVisionTransformer):
        return TimmHost(net)
    raise ValueError(
        f"tokens of a {type(net).__name__} cannot be reduced: hosts are timm's VisionTransformer, "
        "the ViTs of vit.models and the hybrids of octic.models"
    )
