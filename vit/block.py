"""The pre-norm transformer block, plain or equivariant alike: only its layers differ."""

from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import LayerScale, Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from vit.attention import Attention
from vit.packing import Packing
from vit.stochastic_depth import add_branch, check_mode, drawn_factors


class Addend(NamedTuple):
    """A sum not taken yet: tokens [B T D] to add, and a bias [C] for their first C channels.

    factors: of drop path, [B 1 1] or [1 T 1], by which both are multiplied.
    """

    tokens: Tensor
    bias: Tensor | None = None
    factors: Tensor | None = None

    def to(self, x: Tensor) -> Tensor:
        """x [B T D] with the addend added."""
        tokens, bias, factors = self
        x = x + (tokens if factors is None else tokens * factors)
        if bias is None:
            return x
        bias = F.pad(bias, (0, x.shape[-1] - len(bias)))
        return x + (bias if factors is None else bias * factors)


def added(x: Tensor, addend: Addend | None) -> Tensor:
    """x with the addend of the block before, if there is one."""
    return x if addend is None else addend.to(x)


Deferred = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def terms_of(out: Tensor | Deferred) -> tuple[Tensor, Addend | None]:
    """Split what a block returned into tokens and its addend (None: nothing is left to add)."""
    if isinstance(out, Tensor):
        return out, None
    x, tokens, bias, factors = out
    return x, None if tokens is None else Addend(tokens, bias, factors)


def has_hooks(layer: nn.Module) -> bool:
    """Whether anyone registered forward or backward hooks on the layer itself."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


class ResidualBlock(nn.Module):
    """x += ls1(attn(norm1 x)); x += ls2(mlp(norm2 x)), each branch under stochastic depth.

    defers_sum: whether the trunk calls the block with `defer`. Not for plain blocks: their float32
        layer scale makes the branch a wider tensor, which costs more than the fused sum saves.
    """

    defers_sum = False

    def __init__(
        self,
        *,
        norm1: nn.Module,
        attn: nn.Module,
        ls1: nn.Module,
        norm2: nn.Module,
        mlp: nn.Module,
        ls2: nn.Module,
        drop_path_rate: float = 0.0,
        drop_path_mode: str = "sample",
    ) -> None:
        super().__init__()
        check_mode(drop_path_mode)
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate {drop_path_rate} is not in [0, 1)")
        self.norm1, self.attn, self.ls1 = norm1, attn, ls1
        self.norm2, self.mlp, self.ls2 = norm2, mlp, ls2
        self.drop_path_rate = drop_path_rate
        self.drop_path_mode = drop_path_mode

    def forward(
        self,
        x: Tensor,
        packing: Packing | None = None,
        addend: Addend | None = None,
        defer: bool = False,
    ) -> Tensor | Deferred:
        """Map tokens [B T D], packed or not, to tokens of the same shape.

        Residual sums can be fused with the norm that follows: one pass over memory instead of two.
        So a block first adds the `addend` that the block before left it, and with `defer` it leaves
        its own last sum to the next block: it returns (tokens, *addend), None where nothing is
        left to add; `terms_of` reads it. A plain tuple, because Dynamo of torch 2.11 cannot return
        a named one.
        """
        rate = self.drop_path_rate if self.training else 0.0
        ready = self._prepare(x)
        if rate and self.drop_path_mode == "subset":
            x = added(x, addend)
            mix_tokens, mix_channels = (
                partial(mix, ready=ready) for mix in (self._mix_tokens, self._mix_channels)
            )
            x = add_branch(x, mix_tokens, packing, rate=rate, mode="subset")
            x = add_branch(x, mix_channels, packing, rate=rate, mode="subset")
            return (x, None, None, None) if defer else x
        x, normed = self._add_and_norm(x, addend, self.norm1)
        addend = self._attend(normed, packing, ready, defer=True)
        addend = _thinned(addend, packing, rate, x.dtype)
        x, normed = self._add_and_norm(x, addend, self.norm2)
        addend = self._transform(normed, ready, defer=defer)
        addend = _thinned(addend, packing, rate, x.dtype)
        return (x, *addend) if defer else addend.to(x)

    def _mix_tokens(self, x: Tensor, packing: Packing | None, ready: Any = None) -> Tensor:
        """The attention branch [B T D]."""
        return self._attend(self.norm1(x), packing, ready, defer=False).tokens

    def _mix_channels(self, x: Tensor, packing: Packing | None, ready: Any = None) -> Tensor:
        """The MLP branch [B T D]."""
        return self._transform(self.norm2(x), ready, defer=False).tokens

    # Octic blocks override these. With `defer` an addend may carry a bias.

    def _prepare(self, x: Tensor) -> Any:
        """What both branches need besides the tokens, computed once per block."""
        return None

    def _add_and_norm(
        self, x: Tensor, addend: Addend | None, norm: nn.Module
    ) -> tuple[Tensor, Tensor]:
        x = added(x, addend)
        return x, norm(x)

    def _attend(
        self, normed: Tensor, packing: Packing | None, ready: Any, *, defer: bool
    ) -> Addend:
        return Addend(self.ls1(self.attn(normed, packing)))

    def _transform(self, normed: Tensor, ready: Any, *, defer: bool) -> Addend:
        return Addend(self.ls2(self.mlp(normed)))


def _thinned(addend: Addend, packing: Packing | None, rate: float, dtype: torch.dtype) -> Addend:
    """The addend under drop path."""
    if not rate:
        return addend
    return addend._replace(factors=drawn_factors(addend.tokens, packing, rate, dtype=dtype))


class Block(ResidualBlock):
    """The plain block of DeiT III and DINOv2.

    attention_class: built with the options of `Attention`; a subclass may have its own.
    """

    attention_class: type[nn.Module] = Attention

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        mlp_bias: bool = True,
        init_values: float | None = None,
        attn_drop: float = 0.0,
        qk_scale: float | None = None,
        norm_eps: float = 1e-6,
        drop_path_rate: float = 0.0,
        drop_path_mode: str = "sample",
        attention_backend: str = "auto",
    ) -> None:
        super().__init__(
            norm1=nn.LayerNorm(dim, eps=norm_eps),
            attn=self.attention_class(
                dim,
                num_heads=num_heads,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                attn_drop=attn_drop,
                qk_scale=qk_scale,
                backend=attention_backend,
            ),
            ls1=LayerScale(dim, init_values) if init_values else nn.Identity(),
            norm2=nn.LayerNorm(dim, eps=norm_eps),
            mlp=Mlp(dim, int(dim * mlp_ratio), bias=mlp_bias),
            ls2=LayerScale(dim, init_values) if init_values else nn.Identity(),
            drop_path_rate=drop_path_rate,
            drop_path_mode=drop_path_mode,
        )
