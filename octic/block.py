"""The octic transformer block: the plain block with equivariant layers."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from octic.attention import OcticAttention
from octic.device import takes_triton
from octic.groups import Group, get_group
from octic.layer_tensors import Matrices
from octic.layers import (
    OcticLayerNorm,
    OcticMlp,
    OcticScale,
    matrices_of,
)
from vit.block import Addend, ResidualBlock, has_hooks
from vit.packing import Packing

Ready = Sequence[Matrices | None]  # of qkv, proj, fc1, fc2
NOTHING_READY: Ready = (None,) * 4


class OcticBlock(ResidualBlock):
    """x += ls1(attn(norm1 x)); x += ls2(mlp(norm2 x)); block(g x) = g block(x)."""

    defers_sum = True  # the layer scales are in the matrices

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
        attention_mixer: bool = False,
        norm_eps: float = 1e-5,
        irrep_weights: Mapping[str, float] | None = None,
        drop_path_rate: float = 0.0,
        drop_path_mode: str = "sample",
        attention_backend: str = "auto",
        group: str | Group = "D4",
    ) -> None:
        group = get_group(group)

        def norm() -> nn.Module:
            return OcticLayerNorm(dim, eps=norm_eps, irrep_weights=irrep_weights, group=group)

        def scale() -> nn.Module:
            return OcticScale(dim, init_values, group=group) if init_values else nn.Identity()

        super().__init__(
            norm1=norm(),
            attn=OcticAttention(
                dim,
                num_heads=num_heads,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                attn_drop=attn_drop,
                qk_scale=qk_scale,
                mixer=attention_mixer,
                backend=attention_backend,
                group=group,
            ),
            ls1=scale(),
            norm2=norm(),
            mlp=OcticMlp(dim, int(dim * mlp_ratio), bias=mlp_bias, group=group),
            ls2=scale(),
            drop_path_rate=drop_path_rate,
            drop_path_mode=drop_path_mode,
        )

    def _prepare(self, x: Tensor) -> Ready:
        # On a GPU one launch for all four layers; elsewhere each layer makes its own.
        if not takes_triton(x):
            return NOTHING_READY
        layers = [*self.attn.layers(self.ls1), *self.mlp.layers(self.ls2)]
        return matrices_of(layers, x)

    def _add_and_norm(
        self, x: Tensor, addend: Addend | None, norm: nn.Module
    ) -> tuple[Tensor, Tensor]:
        # A norm put in the place of ours may know no sums.
        if addend is None or has_hooks(norm) or not isinstance(norm, OcticLayerNorm):
            return super()._add_and_norm(x, addend, norm)
        return norm.after(x, *addend)

    def _attend(
        self, normed: Tensor, packing: Packing | None, ready: Ready | None, *, defer: bool
    ) -> Addend:
        matrices = (ready or NOTHING_READY)[:2]
        if defer and not has_hooks(self.attn):
            return Addend(*self.attn.without_bias(normed, packing, self.ls1, matrices))
        return Addend(self.attn(normed, packing, self.ls1, matrices))

    def _transform(self, normed: Tensor, ready: Ready | None, *, defer: bool) -> Addend:
        matrices = (ready or NOTHING_READY)[2:]
        if defer and not has_hooks(self.mlp):
            return Addend(*self.mlp.without_bias(normed, self.ls2, matrices))
        return Addend(self.mlp(normed, self.ls2, matrices))
