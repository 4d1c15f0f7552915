"""The octic transformer block: the plain block with equivariant layers."""

from collections.abc import Mapping

from torch import Tensor, nn

from octic.groups import Group, get_group
from octic.layers import OcticAttention, OcticLayerNorm, OcticMlp, OcticScale
from vit.block import ResidualBlock
from vit.packing import Packing


class OcticBlock(ResidualBlock):
    """x += ls1(attn(norm1 x)); x += ls2(mlp(norm2 x)); block(g x) = g block(x)."""

    holds = True  # the layer scales are in the matrices

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

    def _add_and_norm(
        self, x: Tensor, branch: Tensor | None, norm: nn.Module
    ) -> tuple[Tensor, Tensor]:
        return (x, norm(x)) if branch is None else norm.after(x, branch)

    def _attend(self, normed: Tensor, packing: Packing | None) -> Tensor:
        return self.attn(normed, packing, self.ls1)

    def _transform(self, normed: Tensor) -> Tensor:
        return self.mlp(normed, self.ls2)
