"""Attention that also ranks the tokens, and the block that drops some before its MLP.

Letters in shapes: B images, n tokens after the class token, k of them kept, D channels.
"""

from typing import Any, NamedTuple

from torch import Tensor

from baselines.selection import class_attention, keep_tokens, most_important
from vit.attention import Attention
from vit.block import Block
from vit.packing import Packing
from vit.stochastic_depth import add_branch


class Attended(NamedTuple):
    """The output of attention and, if tokens are to be dropped, the kept ones."""

    x: Tensor  # [B 1+n D]
    kept: Tensor | None = None  # indices [B k], the most important first
    importance: Tensor | None = None  # [B n], of the class token's attention


class Reduced(NamedTuple):
    """The output of a block; if it dropped tokens, also the kept ones and all tokens before."""

    x: Tensor  # [B 1+n' D]
    kept: Tensor | None = None  # indices [B k]
    before: Tensor | None = None  # [B 1+n D], after the residual sum of attention


class EViTAttention(Attention):
    """Multi-head self-attention; the parameter names of any ViT."""

    def select(self, x: Tensor, num_kept: int | None = None) -> Attended:
        """Attend among tokens [B 1+n D]; `num_kept` asks for the most important ones."""
        q, k, v = self.queries_keys_values(x)
        out = self.attended(q, k, v)
        if num_kept is None:
            return Attended(out)
        importance = class_attention(q.transpose(1, 2), k.transpose(1, 2))[:, 1:]
        return Attended(out, most_important(importance, num_kept), importance)


class EViTBlock(Block):
    """x += attn(norm1 x); drop and fuse tokens; x += mlp(norm2 x), both under stochastic depth.

    fuse_token: the dropped tokens become one more token instead of vanishing. Other options are
    those of `vit.block.Block`.
    """

    attention_class = EViTAttention
    attn: EViTAttention

    def __init__(self, dim: int, *, fuse_token: bool = False, **options: Any) -> None:
        super().__init__(dim, **options)
        if self.drop_path_mode != "sample":
            raise ValueError(
                f"drop_path_mode {self.drop_path_mode!r} leaves images without attention, which is "
                'to tell their important tokens; use "sample"'
            )
        self.fuse_token = fuse_token

    def forward(self, x: Tensor, num_kept: int | None = None) -> Reduced:  # type: ignore[override]
        """Tokens [B 1+n D]; `num_kept` of the n are left, and the fused one. None: all."""
        rate = self.drop_path_rate if self.training else 0.0
        found: list[Attended] = []

        def mix_tokens(tokens: Tensor, packing: Packing | None) -> Tensor:
            found.append(self.attn.select(self.norm1(tokens), num_kept))
            return self.ls1(found[-1].x)

        x = add_branch(x, mix_tokens, None, rate=rate, mode=self.drop_path_mode)
        _, kept, importance = found[-1]
        if kept is None or importance is None:
            return Reduced(self._add_mlp(x, rate))
        left = keep_tokens(x, kept, importance, num_prefix=1, fuse=self.fuse_token)
        return Reduced(self._add_mlp(left, rate), kept, x)

    def _add_mlp(self, x: Tensor, rate: float) -> Tensor:
        return add_branch(x, self._mix_channels, None, rate=rate, mode=self.drop_path_mode)
