"""Initial weights of layers, as both recipes draw them."""

import math

from torch import Tensor, nn


def init_linear(layer: nn.Module) -> None:
    """Truncated normal weights of deviation 0.02, zero biases (both recipes)."""
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def init_convolution(weight: Tensor, bias: Tensor | None) -> None:
    """Uniform weight and bias of bound 1/sqrt(fan in)."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    if bias is not None:
        bound = 1 / math.sqrt(weight[0].numel())
        nn.init.uniform_(bias, -bound, bound)


def fresh_head(net: nn.Module, width: int, num_classes: int) -> nn.Linear | nn.Identity:
    """A newly drawn classifier beside a net's parameters, in their dtype (0 classes: none)."""
    if num_classes <= 0:
        return nn.Identity()
    like = next(net.parameters())
    head = nn.Linear(width, num_classes, device=like.device, dtype=like.dtype)
    init_linear(head)
    return head
