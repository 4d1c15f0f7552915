"""Sequential overlapping patch embedding (SOPE): convolutions instead of one projection.

Lu et al. 2022, section 3.2. Letters in shapes: B images, C channels, H W pixels, p patch size, D
channels of a token.
"""

import torch
from torch import Tensor, nn

PATCHES = {2: (1,), 4: (2, 1), 16: (8, 4, 2, 1)}  # patch size -> D over the width of each unit


class Affine(nn.Module):
    """alpha x + beta with a number per channel, for maps [B C H W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift each channel."""
        return self.alpha * x + self.beta


class OverlappingPatchEmbed(nn.Module):
    """Images [B C H W] to tokens [B H/p W/p D] by convolutions of stride 2, batch norms and GELUs.

    A GELU separates two units; patches of 2, with one unit, end in a GELU, as published.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        if patch_size not in PATCHES:
            known = ", ".join(map(str, PATCHES))
            raise ValueError(f"DHVT embeds patches of {known} pixels, not of {patch_size}")
        parts = PATCHES[patch_size]
        if embed_dim % parts[0]:
            raise ValueError(
                f"embed_dim {embed_dim} is not a multiple of {parts[0]}, which patches of "
                f"{patch_size} need"
            )
        widths = [in_chans, *(embed_dim // part for part in parts)]
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [nn.Sequential(convolution, nn.BatchNorm2d(after)), nn.GELU()]
        self.proj = nn.Sequential(*layers[: None if len(parts) == 1 else -1])
        self.pre_affine = Affine(in_chans)
        self.post_affine = Affine(embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Tokens of a grid, channels last."""
        x = self.post_affine(self.proj(self.pre_affine(images)))
        return x.permute(0, 2, 3, 1)
