"""Trunks whose blocks do more than map tokens [B T D] to as many: they drop some, or use the grid.

Such a trunk implements `Trunk.run`, from images on, itself.

Letters in shapes: B images, T tokens, D channels.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from vit.initialisation import fresh_head, init_linear
from vit.trunk import Trunk

SIZES = ("patch_size", "num_heads")


class TappedTrunk(Trunk):
    """A trunk that runs from images, and may end in a layer between pooling and head."""

    pre_logits: nn.Module

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Patches of images, down and across; ValueError for images the net does not take."""
        self._check_images(images)
        height, width = images.shape[-2:]
        return height // self.patch_size, width // self.patch_size

    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """All tokens [B T D] that are left after the last block, normalised."""
        if masks is not None:
            raise ValueError(f"{type(self).__name__} hides no patches: it takes no masks")
        return self.norm(self.run(x)[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, drop out and classify tokens [B T D]."""
        x = self.head_drop(self.pre_logits(self.pool(x)))
        return x if pre_logits else self.head(x)

    def encode(self, crops: Sequence[Tensor], masks: Any = None) -> NoReturn:
        """Refused: crops of several sizes in one sequence would share their tokens."""
        raise ValueError(
            f"{type(self).__name__} does not train with DINOv2: its blocks take images of one size "
            "and no mask tokens; use the DeiT recipe"
        )

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one (0 classes: none)."""
        super().reset_classifier(num_classes, global_pool)
        if num_classes > 0 and self.num_features != self.embed_dim:
            self.head = fresh_head(self, self.num_features, num_classes)

    def _add_pre_logits(self, representation_size: int | None) -> None:
        """A linear layer with tanh before the head, as DeiT's code offers one; None: none."""
        self.pre_logits = nn.Identity()
        if not representation_size:
            return
        layers = nn.Sequential()
        layers.add_module("fc", nn.Linear(self.embed_dim, representation_size))
        layers.add_module("act", nn.Tanh())
        self.pre_logits = layers
        self.num_features = self.head_hidden_size = representation_size
        if self.num_classes > 0:
            self.head = nn.Linear(representation_size, self.num_classes)
        self.pre_logits.apply(init_linear)
        self.head.apply(init_linear)
