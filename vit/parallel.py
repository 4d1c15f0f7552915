"""ViTs of half the depth whose blocks have two attentions and two MLPs side by side.

Touvron et al. 2022, "Three things everyone should know about Vision Transformers". Attribute names
are the published ones: `attn` and `attn1`, `norm1` and `norm11`, and so on.
"""

from typing import Any

from torch import Tensor, nn

from vit.block import Block
from vit.packing import Packing
from vit.stochastic_depth import Branch, add_branch
from vit.vision_transformer import VisionTransformer


class ParallelBlock(Block):
    """x += ls1(attn(norm1 x)) + ls11(attn1(norm11 x)); the same with the MLPs.

    Each branch is dropped by itself, for whole sequences (drop_path_mode "sample").
    """

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        if self.drop_path_mode != "sample":
            raise ValueError(
                f"drop_path_mode {self.drop_path_mode!r} is not for parallel branches, which read "
                'the same tokens; use "sample"'
            )
        twin = Block(dim, **options)
        self.norm11, self.attn1, self.ls11 = twin.norm1, twin.attn, twin.ls1
        self.norm21, self.mlp1, self.ls21 = twin.norm2, twin.mlp, twin.ls2

    def forward(  # type: ignore[override]
        self, x: Tensor, packing: Packing | None = None
    ) -> Tensor:
        """Map tokens [B T D], packed or not, to tokens of the same shape."""
        x = self._add_both(x, packing, self._mix_tokens, self._mix_tokens_too)
        return self._add_both(x, packing, self._mix_channels, self._mix_channels_too)

    def _add_both(
        self, x: Tensor, packing: Packing | None, first: Branch, second: Branch
    ) -> Tensor:
        rate = self.drop_path_rate if self.training else 0.0
        out = add_branch(x, first, packing, rate=rate, mode="sample")
        # The second reads x, not what the first has made of it.
        return add_branch(out, lambda _, p: second(x, p), packing, rate=rate, mode="sample")

    def _mix_tokens_too(self, x: Tensor, packing: Packing | None) -> Tensor:
        return self.ls11(self.attn1(self.norm11(x), packing))

    def _mix_channels_too(self, x: Tensor, packing: Packing | None) -> Tensor:
        return self.ls21(self.mlp1(self.norm21(x)))


class ParallelVisionTransformer(VisionTransformer):
    """Plain ViT of parallel blocks; `depth` counts blocks, each as wide as two."""

    block_class: type[nn.Module] = ParallelBlock
