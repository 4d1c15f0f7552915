"""A block: attention over the group and an MLP per pixel, with a shortcut around the attention.

Letters in shapes: B images, C D channels in and out, G elements of the group, H W map, k cropped
pixels.
"""

from torch import Tensor, nn

from baselines.gevit.attention import GroupSelfAttention
from baselines.gevit.groups import PlaneGroup
from baselines.gevit.layers import crop, make_activation, make_norm


class Block(nn.Module):
    """[B C G H W] to [B D G H-2k W-2k]: z = crop(attention(x)) + crop(shortcut(x)), z + MLP(z).

    Norms and activations surround the attention; the MLP is normalised at its end. The law is
    that of `GroupSelfAttention`. mid_channels: of a head; None is half of the outputs.
    """

    def __init__(
        self,
        group: str | PlaneGroup,
        in_channels: int,
        out_channels: int,
        num_heads: int,
        *,
        mid_channels: int | None = None,
        window: int | None = None,
        map_size: int | None = None,
        crop: int = 0,
        norm: str = "layer",
        act: str = "swish",
        attn_drop_rate: float = 0.0,
        value_drop_rate: float = 0.0,
        group_table: str = "exact",
        memory_mb: float = 64.0,
        recompute: bool = True,
    ) -> None:
        super().__init__()
        if crop < 0:
            raise ValueError(f"a crop of {crop} pixels is none; it must not be negative")
        self.crop = crop
        attention = GroupSelfAttention(
            group,
            in_channels,
            out_channels // 2 if mid_channels is None else mid_channels,
            out_channels,
            num_heads,
            window=window,
            map_size=map_size,
            attn_drop_rate=attn_drop_rate,
            group_table=group_table,
            memory_mb=memory_mb,
            recompute=recompute,
        )
        self.attention = nn.Sequential(
            make_norm(norm, in_channels),
            make_activation(act),
            attention,
            make_norm(norm, out_channels),
            make_activation(act),
            nn.Dropout(value_drop_rate),
        )
        same = in_channels == out_channels
        self.shortcut = nn.Sequential(*([] if same else [nn.Conv3d(in_channels, out_channels, 1)]))
        self.mlp = nn.Sequential(
            nn.Conv3d(out_channels, out_channels // 2, 1),
            make_norm(norm, out_channels // 2),
            make_activation(act),
            nn.Conv3d(out_channels // 2, out_channels, 1),
            make_norm(norm, out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run the block; ValueError for a map of which the crop leaves nothing."""
        if min(x.shape[-2:]) <= 2 * self.crop:
            raise ValueError(
                f"nothing is left of a map of {x.shape[-2]} x {x.shape[-1]} after cropping "
                f"{self.crop} pixels off each side; give larger images"
            )
        z = crop(self.attention(x), self.crop) + crop(self.shortcut(x), self.crop)
        return z + self.mlp(z)
