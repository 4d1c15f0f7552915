"""The pre-norm transformer block, plain or equivariant alike: only its layers differ."""

from timm.layers import LayerScale, Mlp
from torch import Tensor, nn

from vit.attention import Attention
from vit.packing import Packing
from vit.stochastic_depth import add_branch, check_mode


class ResidualBlock(nn.Module):
    """x += ls1(attn(norm1 x)); x += ls2(mlp(norm2 x)), each branch under stochastic depth."""

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

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """Map tokens [B T D], packed or not, to tokens of the same shape."""
        rate = self.drop_path_rate if self.training else 0.0
        x = add_branch(x, self._mix_tokens, packing, rate=rate, mode=self.drop_path_mode)
        return add_branch(x, self._mix_channels, packing, rate=rate, mode=self.drop_path_mode)

    def _mix_tokens(self, x: Tensor, packing: Packing | None) -> Tensor:
        return self.ls1(self.attn(self.norm1(x), packing))

    def _mix_channels(self, x: Tensor, packing: Packing | None) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x)))


class Block(ResidualBlock):
    """The plain block of DeiT III and DINOv2."""

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
        norm_eps: float = 1e-6,
        drop_path_rate: float = 0.0,
        drop_path_mode: str = "sample",
        attention_backend: str = "auto",
    ) -> None:
        super().__init__(
            norm1=nn.LayerNorm(dim, eps=norm_eps),
            attn=Attention(
                dim,
                num_heads=num_heads,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                attn_drop=attn_drop,
                backend=attention_backend,
            ),
            ls1=LayerScale(dim, init_values) if init_values else nn.Identity(),
            norm2=nn.LayerNorm(dim, eps=norm_eps),
            mlp=Mlp(dim, int(dim * mlp_ratio), bias=mlp_bias),
            ls2=LayerScale(dim, init_values) if init_values else nn.Identity(),
            drop_path_rate=drop_path_rate,
            drop_path_mode=drop_path_mode,
        )
