"""Self-attention between pixels: from images to maps on the group, and between such maps.

Departs from GE-ViT: scores stream (`baselines.gevit.streaming`), positions are kept exactly and in
no state dict, maps may be oblong, and masks follow each map's size.

Letters in shapes: B images, C D channels in and out, H W map, G elements of the group, N heads, c
channels of a head (index c N + head: the head changes fastest).
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from baselines.gevit.groups import PlaneGroup, get_group
from baselines.gevit.neighbours import make_neighbours
from baselines.gevit.positions import PositionFunction
from baselines.gevit.streaming import (
    all_probabilities,
    in_tiles,
    summed_probabilities,
    tile_sizes,
)
from utils.ranges import check_count, check_range
from vit.backbone import is_exporting


class _SelfAttention(nn.Module):
    """What both attentions share: projections, positions, and attention tile by tile.

    window: side of the neighbourhood, or None for the whole map, whose side is `map_size`.
    memory_mb: memory for scores and the like at one time; at least one row of queries is computed.
    recompute: keep this limit in training too, by recomputing them in the backward pass; without
    it, training keeps what is quadratic in |G|, and each window's keys and values.
    """

    projection: type[nn.Module]  # of images, or of maps on the group

    def __init__(
        self,
        group: str | PlaneGroup,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        num_heads: int,
        *,
        position_channels: int,
        window: int | None = None,
        map_size: int | None = None,
        attn_drop_rate: float = 0.0,
        memory_mb: float = 64.0,
        recompute: bool = True,
    ) -> None:
        super().__init__()
        check_count("num_heads", num_heads, 1)
        check_range("attn_drop_rate", attn_drop_rate, 0, 1, ends="[)")
        check_range("memory_mb", memory_mb, ends="()")
        self.group = get_group(group)
        self.num_heads, self.mid_channels = num_heads, mid_channels
        self.position_channels = position_channels
        self.attn_drop_rate = attn_drop_rate
        self.memory_mb, self.recompute = memory_mb, recompute
        # Of the layer's input, not of a head, as published.
        self.scale = 1 / math.sqrt(in_channels)
        self.neighbours = make_neighbours(self.group, window=window, map_size=map_size)
        self.row_embedding = PositionFunction(position_channels)
        self.col_embedding = PositionFunction(position_channels)
        width = mid_channels * num_heads
        self.wout = nn.Conv3d(width, out_channels, 1)
        self.query = self.projection(in_channels, width, 1)
        self.key = self.projection(in_channels, width, 1)
        self.value = self.projection(in_channels, width, 1)

    def extra_repr(self) -> str:
        return f"group={self.group.name}, heads={self.num_heads}"

    def attend(self, x: Tensor, *, keep_probabilities: bool = False) -> Tensor:
        """Outputs [B D G H W] for maps [B C g H W], or the probabilities [B N G g H W m J]."""
        size = (x.shape[-2], x.shape[-1])
        queries = self._heads(self.query, x).permute(0, 2, 4, 5, 3, 1) * self.scale
        keys, values = (
            self.neighbours.prepare(self._heads(layer, x).transpose(1, 2))
            for layer in (self.key, self.value)
        )
        embedded = self.neighbours.offsets(self.row_embedding, self.col_embedding)
        run = functools.partial(
            self._tile, queries, keys, values, embedded, self._embedded_relations(), size
        )
        if keep_probabilities:
            found = run(slice(0, len(x)), slice(0, size[0]), keep_probabilities=True)
            return found.permute(0, 1, 4, 5, 2, 3, 6, 7)  # from [B N H W v g m J]
        # A program takes any number of images, so its parts may not depend on one.
        count = None if is_exporting() else len(x)
        y = in_tiles(
            run,
            (count, size[0]),
            self._tile_sizes(x, size, count or 1),
            recompute=self.recompute,
            random=self._drop_rate > 0,
        )
        return self.wout(y)

    def _heads(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Projection of maps [B C g H W], split by head: [B c N g H W]."""
        return layer(x).unflatten(1, (self.mid_channels, self.num_heads))

    @property
    def _drop_rate(self) -> float:
        return self.attn_drop_rate if self.training else 0.0

    def _embedded_relations(self) -> Tensor | None:
        """Of query to key as each output sees it [v g m d]; none when lifting."""
        return None

    def _tile(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        embedded: Tensor,
        relations: Tensor | None,
        size: tuple[int, int],
        images: slice,
        rows: slice,
        *,
        keep_probabilities: bool = False,
    ) -> Tensor:
        """Attention of some rows of some images: [b cN G t W]."""
        part = queries[images, :, rows]  # [b N t W g c]
        keys, values = keys[images], values[images]
        content = self.neighbours.content(part, keys, rows)
        positions = 2 * self.position_channels
        position = self.neighbours.position(part[..., :positions], embedded, rows)
        outside = self.neighbours.outside(size, rows, part.device)
        if outside is not None:
            position = position.masked_fill(outside, -math.inf)
        relation = None
        if relations is not None:
            relation = torch.einsum("bntwgd,vgmd->bntwgvm", part[..., positions:], relations)
        if keep_probabilities:
            return all_probabilities(content, position, relation)
        shares = summed_probabilities(content, position, relation, self._drop_rate)
        mixed = self.neighbours.mix(shares, values, rows)  # [b N t W v c]
        return mixed.permute(0, 5, 1, 4, 2, 3).flatten(1, 2)

    def _tile_sizes(self, x: Tensor, size: tuple[int, int], count: int) -> tuple[int, int]:
        """Images, of `count`, and rows that `memory_mb` allows at once; all on `meta`."""
        num_keys = self.neighbours.num_keys(size)
        if x.device.type == "meta":
            return count, size[0]
        order, elements = self.group.order, x.shape[2]
        # The content, its gradient, and scores, shares and their gradients for one output.
        numbers = elements * (6 * elements + 2 * order) + 2 * elements * order
        if self.neighbours.copies:
            numbers += 2 * elements * self.mid_channels
        row_bytes = self.num_heads * size[1] * num_keys * numbers * x.dtype.itemsize
        return tile_sizes(count, size[0], row_bytes, self.memory_mb)


class LiftingSelfAttention(_SelfAttention):
    """Images [B C H W] to maps on the group [B D G H W].

    s_h(i, j) = (q_i k_j + q_i [phi_row(h (j - i)), phi_col(h (j - i))]) / sqrt(C),
    y_h(i) = W sum_j softmax_j(s_h(i, j)) v_j. A symmetry T moves it as y(T x)[g] = T y(x)[g R(T)].
    mid_channels: of a head, even, as half of them meet the rows' positions and half the columns'.
    Other options are those of `_SelfAttention`.
    """

    projection = nn.Conv2d

    def __init__(
        self,
        group: str | PlaneGroup,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        num_heads: int,
        **options: Any,
    ) -> None:
        if mid_channels < 2 or mid_channels % 2:
            raise ValueError(
                f"lifting needs an even number of channels in a head, half for rows and half for "
                f"columns, not {mid_channels}"
            )
        super().__init__(
            group,
            in_channels,
            mid_channels,
            out_channels,
            num_heads,
            position_channels=mid_channels // 2,
            **options,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Lift images [B C H W]: [B D G H W]."""
        return self.attend(images.unsqueeze(2))

    def probabilities(self, images: Tensor) -> Tensor:
        """What each pixel attends to [B N G H W J], J positions row by row."""
        found = self.attend(images.unsqueeze(2), keep_probabilities=True)
        return found[:, :, :, 0, :, :, 0]  # images have no group axis, nor have their keys

    def _heads(self, layer: nn.Module, x: Tensor) -> Tensor:
        return super()._heads(layer, x.squeeze(2)).unsqueeze(3)


class GroupSelfAttention(_SelfAttention):
    """Maps on the group to maps on the group: [B C G H W] to [B D G H W].

    s_v(g, i; m, j) = q_gi (k_mj + [phi_row(v (j - i)), phi_col(v (j - i)), E[table[v, g, m]]])
    / sqrt(C), softmax jointly over (m, j), y_v(i) = W sum_g sum_(m, j) a_v(g, i; m, j) v_mj. The
    law: for x'[g] = T x[g R(T)], y'[g] = T y[g R(T)].
    group_table: `exact`, or the published one (see `PlaneGroup.relations`). Other options are those
    of `_SelfAttention`.
    """

    projection = nn.Conv3d

    def __init__(
        self,
        group: str | PlaneGroup,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        num_heads: int,
        *,
        group_table: str = "exact",
        **options: Any,
    ) -> None:
        if mid_channels < 3:
            raise ValueError(
                f"group attention needs 3 channels or more in a head, for rows, columns and the "
                f"group, not {mid_channels}"
            )
        super().__init__(
            group,
            in_channels,
            mid_channels,
            out_channels,
            num_heads,
            position_channels=mid_channels // 3,
            **options,
        )
        relations = torch.as_tensor(self.group.relations(group_table))
        self.group_embedding = nn.Embedding(
            self.group.order, mid_channels - 2 * self.position_channels
        )
        self.register_buffer("relations", relations, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attend between all elements and pixels."""
        return self.attend(x)

    def probabilities(self, x: Tensor) -> Tensor:
        """What each element and pixel attends to [B N v g H W m J], J positions row by row."""
        return self.attend(x, keep_probabilities=True)

    def _embedded_relations(self) -> Tensor | None:
        return self.group_embedding(self.relations)
