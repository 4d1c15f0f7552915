"""The layers that replace attention and MLP in a DHVT block.

Lu et al. 2022, sections 3.3 and 3.4. Letters in shapes: B images, N tokens, h w grid of patches, H
heads, D channels, E = D / H channels of a head, F hidden channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit.attention import Attention
from vit.stochastic_depth import add_branch


class HeadInteractedAttention(Attention):
    """Self-attention with a token for each head among the others (HI-MHSA).

    t_i = GELU(LN(ht_proj(mean over tokens of head i's channels))) + pos_embed_i, i = 1..H, join the
    sequence; their outputs are averaged and added to the class token.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            dim, num_heads=num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, backend=backend
        )
        channels = dim // num_heads
        self.ht_proj = nn.Linear(channels, dim)
        self.ht_norm = nn.LayerNorm(channels)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_heads, dim))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Tokens [B N D], the class token first, to as many."""
        count = x.shape[1]
        with_heads = torch.cat([x, self.head_tokens(x)], dim=1)
        out = self.attended(*self.queries_keys_values(with_heads))
        tokens, heads = out[:, :count], out[:, count:]
        cls = tokens[:, :1] + heads.mean(dim=1, keepdim=True)
        return torch.cat([cls, tokens[:, 1:]], dim=1)

    def head_tokens(self, x: Tensor) -> Tensor:
        """Head tokens [B H D] of tokens [B N D]; the class token counts in the mean."""
        means = x.mean(dim=1).unflatten(-1, (self.num_heads, -1))
        parts = self.ht_proj(means).unflatten(-1, (self.num_heads, -1))  # [B H H E]
        return F.gelu(self.ht_norm(parts)).flatten(2) + self.pos_embed


class DynamicAggregationFeedForward(nn.Module):
    """An MLP of convolutions on the grid, which gates the class token (DAFF).

    patches: conv3(a + GELU(conv2 a)) with a = GELU(conv1 x), a batch norm after each convolution;
    class token: times excitation(GELU(compress(mean of the new patches))), without a sigmoid.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        kernel_size: int = 3,
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size} must be odd, to keep the grid")
        if hidden_dim < 1:
            raise ValueError(f"mlp_ratio leaves no channel of {dim}; it must be 1 / {dim} or more")
        out_dim = out_dim or dim
        self.conv1 = nn.Conv2d(dim, hidden_dim, 1)
        self.bn1 = nn.BatchNorm2d(hidden_dim)
        self.conv2 = nn.Conv2d(
            hidden_dim, hidden_dim, kernel_size, padding=kernel_size // 2, groups=hidden_dim
        )
        self.bn2 = nn.BatchNorm2d(hidden_dim)
        self.conv3 = nn.Conv2d(hidden_dim, out_dim, 1)
        self.bn3 = nn.BatchNorm2d(out_dim)
        self.compress = nn.Linear(out_dim, out_dim // 4)
        self.excitation = nn.Linear(out_dim // 4, out_dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B 1+h*w D], the class token first, of a grid (h, w)."""
        cls, patches = x[:, :1], x[:, 1:]
        maps = patches.transpose(1, 2).unflatten(2, grid)
        maps = F.gelu(self.bn1(self.conv1(maps)))
        maps = maps + F.gelu(self.bn2(self.conv2(maps)))
        maps = self.bn3(self.conv3(maps))
        gate = self.excitation(F.gelu(self.compress(maps.mean(dim=(2, 3)))))
        # Not flatten(2).transpose(1, 2): of one image, torch's batch norm on a CPU misreads the
        # strides that its gradient then has.
        return torch.cat([cls * gate[:, None], maps.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class DHVTBlock(nn.Module):
    """x += HI-MHSA(norm1 x); x += DAFF(norm2 x), each branch under stochastic depth."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        norm_eps: float = 1e-6,
        drop_path_rate: float = 0.0,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate {drop_path_rate} is not in [0, 1)")
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = HeadInteractedAttention(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            backend=attention_backend,
        )
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = DynamicAggregationFeedForward(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B 1+h*w D] of a grid (h, w) to as many."""
        rate = self.drop_path_rate if self.training else 0.0
        x = add_branch(x, lambda t, _: self.attn(self.norm1(t)), None, rate=rate, mode="sample")
        return add_branch(
            x, lambda t, _: self.mlp(self.norm2(t), grid), None, rate=rate, mode="sample"
        )
