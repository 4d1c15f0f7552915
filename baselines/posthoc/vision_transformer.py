"""The small Vision Transformer of the post-hoc experiments, registered with timm.

Pre-norm blocks without a final norm: the head is a LayerNorm and a linear layer.

Letters in shapes: B images, C channels, N patches in a grid of h x w, T tokens, D channels.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from utils.ranges import check_counts
from vit.backbone import Features, check_whole_patches, sides_of, take_indices
from vit.models import build, entrypoint


class SmallVisionTransformer(nn.Module):
    """Patches, class token and learned positions, blocks, head; parameter names as published.

    num_patches: number of learned positions; None: as many as the grid has. Images of fewer
    patches use the first positions. A patch is flattened channel by channel, row by row. A net of
    one channel also accepts RGB images and averages their channels.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 28,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 64,
        hidden_dim: int = 512,
        depth: int = 6,
        num_heads: int = 4,
        drop_rate: float = 0.1,
        num_patches: int | None = None,
    ) -> None:
        super().__init__()
        check_counts(0, depth=depth)
        check_counts(1, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim)
        check_counts(1, num_heads=num_heads, hidden_dim=hidden_dim)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")
        height, width = sides_of(img_size)
        check_whole_patches((height, width), patch_size, "img_size")
        self.img_size, self.patch_size = (height, width), patch_size
        self.in_chans, self.num_classes, self.depth = in_chans, num_classes, depth
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.num_prefix_tokens = 1
        self.feature_info = [
            {"module": f"transformer.{i}", "num_chs": embed_dim, "reduction": patch_size}
            for i in range(depth)
        ]
        if num_patches is None:
            num_patches = (height // patch_size) * (width // patch_size)
        self.input_layer = nn.Linear(in_chans * patch_size**2, embed_dim)
        self.transformer = nn.ModuleList(
            AttentionBlock(embed_dim, hidden_dim, num_heads, drop_rate) for _ in range(depth)
        )
        self.mlp_head = self._head(num_classes)
        self.dropout = nn.Dropout(drop_rate)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.pos_embedding = nn.Parameter(torch.randn(1, 1 + num_patches, embed_dim))

    def patches(self, images: Tensor) -> Tensor:
        """Flattened patches [B N C*p*p] of images [B C H W]; ValueError for other sizes."""
        height, width = images.shape[-2:]
        size = self.patch_size
        if self.in_chans == 1 and images.ndim == 4 and images.shape[1] == 3:
            images = images.mean(dim=1, keepdim=True)
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(
                f"images of shape {tuple(images.shape)} for a model of {self.in_chans} channels"
            )
        check_whole_patches((height, width), size)
        rows = images.unflatten(-1, (width // size, size)).unflatten(-3, (height // size, size))
        return rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def embed(self, images: Tensor) -> Tensor:
        """Tokens [B 1+N D], positions added."""
        x = self.input_layer(self.patches(images))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        known = self.pos_embedding.shape[1]
        if x.shape[1] > known:
            raise ValueError(f"{x.shape[1] - 1} patches for a model of {known - 1} positions")
        return self.dropout(x + self.pos_embedding[:, : x.shape[1]])

    def forward_features(self, x: Tensor) -> Tensor:
        """All tokens [B 1+N D] of the last block."""
        x = self.embed(x)
        for block in self.transformer:
            x = block(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The class token [B D], or its logits [B classes]."""
        return x[:, 0] if pre_logits else self.mlp_head(x[:, 0])

    def forward(self, x: Tensor, output_cls: bool = False) -> Tensor:
        """Logits [B classes]; with `output_cls` the class token [B D], as published."""
        return self.forward_head(self.forward_features(x), pre_logits=output_cls)

    def features(self, images: Tensor, layers: Sequence[int] = (-1,)) -> list[Features]:
        """Features of the asked blocks, normalised by the head's LayerNorm (Backbone contract)."""
        indices = take_indices(layers, self.depth)
        grid = tuple(side // self.patch_size for side in images.shape[-2:])
        x, kept = self.embed(images), {}
        for index, block in enumerate(self.transformer[: max(indices) + 1]):
            x = block(x)
            kept[index] = x
        norm = self.mlp_head[0] if isinstance(self.mlp_head, nn.Sequential) else nn.Identity()
        normed = (norm(kept[index]) for index in indices)
        return [Features(cls=t[:, 0], patches=t[:, 1:].unflatten(1, grid)) for t in normed]

    def get_classifier(self) -> nn.Module:
        """LayerNorm and linear layer."""
        return self.mlp_head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one (0 classes: none)."""
        if global_pool not in (None, "token"):
            raise ValueError(f"this model pools by its class token, not by {global_pool!r}")
        self.num_classes = num_classes
        self.mlp_head = self._head(num_classes).to(self.cls_token)

    def no_weight_decay(self) -> set[str]:
        """Class token and positions."""
        return {"cls_token", "pos_embedding"}

    def _head(self, num_classes: int) -> nn.Module:
        if not num_classes:
            return nn.Identity()
        return nn.Sequential(nn.LayerNorm(self.embed_dim), nn.Linear(self.embed_dim, num_classes))


class AttentionBlock(nn.Module):
    """x += MHA(LN1 x); x += MLP(LN2 x)."""

    def __init__(self, embed_dim: int, hidden_dim: int, num_heads: int, drop_rate: float) -> None:
        super().__init__()
        self.layer_norm_1 = nn.LayerNorm(embed_dim)
        self.attn = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)
        self.layer_norm_2 = nn.LayerNorm(embed_dim)
        self.linear = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim),
            nn.GELU(),
            nn.Dropout(drop_rate),
            nn.Linear(hidden_dim, embed_dim),
            nn.Dropout(drop_rate),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B T D] to tokens."""
        n = self.layer_norm_1(x)
        x = x + self.attn(n, n, n, need_weights=False)[0]
        return x + self.linear(self.layer_norm_2(x))


_small = partial(
    entrypoint,
    __name__,
    partial(build, SmallVisionTransformer),
    {"first_conv": "input_layer", "classifier": "mlp_head.1", "fixed_input_size": True},
)

posthoc_vit_mnist = _small(
    "posthoc_vit_mnist",
    "The digits' ViT: 28 x 28, one channel, patches of 4; 97.2 on rotMNIST as published.",
    img_size=28,
    in_chans=1,
    num_classes=10,
    patch_size=4,
)
posthoc_vit_pcam = _small(
    "posthoc_vit_pcam",
    "PCam's ViT: 96 x 96, three channels, patches of 6.",
    img_size=96,
    in_chans=3,
    num_classes=2,
    patch_size=6,
)
