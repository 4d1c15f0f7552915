"""The pre-norm transformer block, plain or equivariant alike: only its layers differ."""

from timm.layers import LayerScale, Mlp
from torch import Tensor, nn

from vit.attention import Attention
from vit.packing import Packing
from vit.stochastic_depth import add_branch, check_mode, drop_whole


class ResidualBlock(nn.Module):
    """x += ls1(attn(norm1 x)); x += ls2(mlp(norm2 x)), each branch under stochastic depth.

    holds: whether it is worth while to leave a block's last sum to the next one (see `forward`). A
        layer scale in float32 makes the branch a wider tensor than the product before it, and then
        it is not.
    """

    holds = False

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
        branch: Tensor | None = None,
        hold: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Map tokens [B T D], packed or not, to tokens of the same shape.

        A norm that follows a sum can take it along, without a pass over memory of its own. So a
        block adds the `branch` of the block before it, if it is given one, and with `hold` returns
        its own last sum as the two terms (the second None where nothing is left to add).
        """
        rate = self.drop_path_rate if self.training else 0.0
        if rate and self.drop_path_mode == "subset":
            x = x if branch is None else x + branch
            x = add_branch(x, self._mix_tokens, packing, rate=rate, mode="subset")
            x = add_branch(x, self._mix_channels, packing, rate=rate, mode="subset")
            return (x, None) if hold else x
        x, normed = self._add_and_norm(x, branch, self.norm1)
        update = drop_whole(self._attend(normed, packing), packing, rate, dtype=x.dtype)
        x, normed = self._add_and_norm(x, update, self.norm2)
        update = drop_whole(self._transform(normed), packing, rate, dtype=x.dtype)
        return (x, update) if hold else x + update

    def _mix_tokens(self, x: Tensor, packing: Packing | None) -> Tensor:
        """The first branch [B T D] of tokens."""
        return self._attend(self.norm1(x), packing)

    def _mix_channels(self, x: Tensor, packing: Packing | None) -> Tensor:
        """The second branch [B T D] of tokens."""
        return self._transform(self.norm2(x))

    # What an equivariant block computes otherwise.

    def _add_and_norm(
        self, x: Tensor, branch: Tensor | None, norm: nn.Module
    ) -> tuple[Tensor, Tensor]:
        x = x if branch is None else x + branch
        return x, norm(x)

    def _attend(self, normed: Tensor, packing: Packing | None) -> Tensor:
        return self.ls1(self.attn(normed, packing))

    def _transform(self, normed: Tensor) -> Tensor:
        return self.ls2(self.mlp(normed))


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
