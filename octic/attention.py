"""Equivariant softmax attention; its plain twin is `vit.attention`."""

import math

import torch
from torch import Tensor, nn

from octic.groups import Group, get_group
from octic.heads import join_heads, split_heads
from octic.layer_tensors import Matrices
from octic.layers import OcticLinear, Pair, channels_per_copy
from vit.attention import attend, check_backend, check_dropout
from vit.backbone import check_counts
from vit.packing import Packing


class OcticAttention(nn.Module):
    """Softmax attention whose heads each hold a part of every irrep.

    Logits are inner products of features, so they are invariant; each head is a feature of width
    D / H, which needs C to be a multiple of the number of heads.

    qk_scale: factor of the logits; None is (D / H)^-1/2.
    mixer: logits are a sum over irreps, weighted by the trained `attn_mixer` (1 for the trivial
        irrep, 0 for the others at first; Flopping for FLOPs, `use_attn_mixer`).
    Departs from Flopping for FLOPs: both work with fused attention, where the published code
    ignores the first and refuses the second.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        qk_scale: float | None = None,
        mixer: bool = False,
        backend: str = "auto",
        group: str | Group = "D4",
    ) -> None:
        super().__init__()
        self.group = get_group(group)
        copy = channels_per_copy(dim, self.group)
        check_counts(1, num_heads=num_heads)
        if copy % num_heads:
            raise ValueError(
                f"num_heads {num_heads} does not divide {copy}, the channels of each copy "
                f"(width {dim} / {self.group.order} elements of {self.group.name}); possible: "
                + ", ".join(str(n) for n in range(1, copy + 1) if copy % n == 0)
            )
        check_backend(backend)
        check_dropout(attn_drop)
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qk_scale = qk_scale
        self.backend = backend
        self.head_dim = dim // num_heads
        width = self.head_dim // self.group.order
        # Channels of one head in each row of each irrep.
        self.row_widths = [i.copies * width for i in self.group.irreps for _ in range(i.dim)]
        self.attn_mixer: nn.Parameter | None = None
        if mixer:
            self.attn_mixer = nn.Parameter(torch.eye(len(self.group.irreps))[0])
        self.qkv = OcticLinear(dim, 3 * dim, bias=qkv_bias, group=self.group)
        self.proj = OcticLinear(dim, dim, bias=proj_bias, group=self.group)

    def forward(
        self,
        x: Tensor,
        packing: Packing | None = None,
        scale: nn.Module | None = None,
        matrices: Pair = (None, None),
    ) -> Tensor:
        """Attend within each sequence, then apply `scale`; x and the result are [B T D].

        matrices: those of both layers, if they are made already.
        """
        return self.proj(self._attended(x, packing, matrices[0]), scale, matrices[1])

    def without_bias(
        self, x: Tensor, packing: Packing | None, scale: nn.Module | None, matrices: Pair
    ) -> tuple[Tensor, Tensor | None]:
        """The result and a bias that is still to be added (`OcticLinear.without_bias`)."""
        return self.proj.without_bias(self._attended(x, packing, matrices[0]), scale, matrices[1])

    def layers(self, scale: nn.Module | None) -> list[tuple[OcticLinear, nn.Module | None]]:
        """The linear layers, each with the scale of its result."""
        return [(self.qkv, None), (self.proj, scale)]

    def _attended(self, x: Tensor, packing: Packing | None, matrices: Matrices | None) -> Tensor:
        features, bias = self.qkv.without_bias(x, None, matrices)
        q, k, v = split_heads(features, self.num_heads, self.row_widths, 3, bias)
        if self.qk_scale is not None or self.attn_mixer is not None:
            q = (q * self._query_factor()).to(k.dtype)
        dropout = self.attn_drop if self.training else 0.0
        out = attend(q, k, v, packing, backend=self.backend, dropout=dropout)
        return join_heads([out], self.row_widths)

    def _query_factor(self) -> Tensor | float:
        """Factor of the queries, so that attention, which scales by itself, gives our logits."""
        scale = 1.0 if self.qk_scale is None else self.qk_scale * math.sqrt(self.head_dim)
        if self.attn_mixer is None:
            return scale
        width = self.head_dim // self.group.order
        parts = [
            weight.expand(irrep.dim * irrep.copies * width)
            for weight, irrep in zip(self.attn_mixer, self.group.irreps, strict=True)
        ]
        return scale * torch.cat(parts)
