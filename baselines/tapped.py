"""Trunks whose blocks do more than map tokens [B T D] to as many: drop some, or look at the grid.

Such a trunk says how it runs from images on (`run`); what recipes, probes and timm ask of it stands
here, once.

Letters in shapes: B images, T tokens, P prefix tokens, h w grid of patches, D channels.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

from torch import Tensor, nn

from vit.backbone import Features
from vit.trunk import Trunk, init_linear, take_indices


class Tapped(NamedTuple):
    """Output of one block before the final norm, with a value for every patch."""

    prefix: Tensor  # [B P D]
    patches: Tensor  # [B h w D]


class TappedTrunk(Trunk):
    """A trunk that runs from images, and may end in a layer between pooling and head."""

    pre_logits: nn.Module

    def run(
        self, images: Tensor, taps: Iterable[int] = (), stop: int = -1
    ) -> tuple[Tensor, dict[int, Tapped]]:
        """Tokens [B T D] after the blocks (up to `stop`, if not negative), and those of `taps`."""
        raise NotImplementedError

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

    def features(self, images: Tensor, layers: Sequence[int] = (-1,)) -> list[Features]:
        """Normalised features of the asked blocks (Backbone contract)."""
        indices = take_indices(layers, self.depth)
        _, kept = self.run(images, taps=indices, stop=max(indices))
        return [
            Features(
                cls=self.norm(kept[index].prefix[:, 0]), patches=self.norm(kept[index].patches)
            )
            for index in indices
        ]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Final tokens and the outputs of the asked blocks, as timm's models give them."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r} is not NCHW or NLC")
        taken = take_indices(indices, self.depth)
        out, kept = self.run(x, taps=taken, stop=max(taken) if stop_early else -1)
        found = []
        for index in taken:
            prefix, patches = map(self.norm, kept[index]) if norm else kept[index]
            if output_fmt == "NCHW":
                maps = patches.permute(0, 3, 1, 2).contiguous()
            else:
                maps = patches.flatten(1, 2)
            found.append((maps, prefix) if return_prefix_tokens else maps)
        return found if intermediates_only else (self.norm(out), found)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one (0 classes: none)."""
        super().reset_classifier(num_classes, global_pool)
        if num_classes > 0 and self.num_features != self.embed_dim:
            reference = next(self.parameters())
            self.head = nn.Linear(self.num_features, num_classes).to(reference)
            init_linear(self.head)

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
