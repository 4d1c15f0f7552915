"""Norms and activations of GE-ViT, under the names of its checkpoints."""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from baselines.gevit.plan import ODD
from utils.ranges import check_word

EPS = 1e-12


class GroupNorm(nn.Module):
    """Normalise each sample over all but the batch, with a gain and a bias per channel.

    Called LayerNorm in the paper. Statistics over channels, group and space do not change when a
    symmetry moves these, so the norm commutes with the group.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer_norm = nn.GroupNorm(1, channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B C ...]."""
        return self.layer_norm(x)


NORMS = {"layer": GroupNorm, "batch": nn.BatchNorm3d}
ACTIVATIONS = {"swish": nn.SiLU, "relu": nn.ReLU}


def make_norm(name: str, channels: int) -> nn.Module:
    """Norm of a group map [B C G H W]: `layer` or `batch`."""
    check_word("norm", name, NORMS)
    return NORMS[name](channels)


def make_activation(name: str) -> nn.Module:
    """Activation: `swish` or `relu`."""
    check_word("act", name, ACTIVATIONS)
    return ACTIVATIONS[name]()


def initialise(net: nn.Module, whitening_scale: float = math.sqrt(2)) -> None:
    """Weights of convolutions N(0, whitening_scale / sqrt(fan in)), tables of the group N(0, 1).

    Biases of convolutions are 0; norms start as they are made, at gain 1 and bias 0.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=whitening_scale / math.sqrt(fan_in))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)


class Halve(nn.Module):
    """Maximum over 2 x 2 pixels of each element: [B C G H W] to [B C G H/2 W/2].

    even: ValueError for an odd extent, which would break the symmetry.
    """

    def __init__(self, *, even: bool) -> None:
        super().__init__()
        self.even = even

    def forward(self, x: Tensor) -> Tensor:
        """Pool."""
        height, width = x.shape[-2:]
        if min(height, width) < 2:
            raise ValueError(f"a map of {height} x {width} cannot be halved; give larger images")
        if self.even and (height % 2 or width % 2):
            raise ValueError(ODD.format(height, width, "give images of another size"))
        return F.max_pool2d(x.flatten(1, 2), 2).unflatten(1, x.shape[1:3])


def crop(x: Tensor, pixels: int) -> Tensor:
    """Cut `pixels` off each side of maps [... H W]."""
    return x[..., pixels:-pixels, pixels:-pixels] if pixels else x
