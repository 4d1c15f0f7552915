"""Projection head of DINO and iBOT: tokens to prototype logits (Caron et al. 2021, section 3.1).

Letters in shapes: B rows, D backbone channels, b bottleneck, K prototypes.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.precision import at_least_float32
from utils.ranges import check_count


class DINOHead(nn.Module):
    """logits = W (MLP(x) / |MLP(x)|), the rows of W of trainable length; [B D] -> [B K].

    mlp_bias: whether the layers of the MLP have biases; W has none.
    Parameter names are the published ones: `mlp.0/2/4.*` (`mlp.*` for one layer),
    `last_layer.weight_g`, `last_layer.weight_v`.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        num_prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        sizes = {
            "num_prototypes": num_prototypes,
            "hidden_dim": hidden_dim,
            "bottleneck_dim": bottleneck_dim,
            "num_layers": num_layers,
        }
        for name, size in sizes.items():
            check_count(name, size, 1)
        self.num_prototypes = num_prototypes
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        pairs = zip(widths[:-1], widths[1:], strict=True)
        linears = [nn.Linear(a, b, bias=mlp_bias) for a, b in pairs]
        for linear in linears:
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if mlp_bias:
                nn.init.zeros_(linear.bias)
        layers: list[nn.Module] = [linears[0]]
        for linear in linears[1:]:
            layers += [nn.GELU(), linear]
        self.mlp = nn.Sequential(*layers) if num_layers > 1 else linears[0]
        self.last_layer = WeightNormLinear(bottleneck_dim, num_prototypes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B K] of tokens [B D]."""
        x = at_least_float32(self.mlp(x))
        return self.last_layer(F.normalize(x, dim=-1))


class WeightNormLinear(nn.Module):
    """y = W x without bias, row k of W being weight_g[k] * weight_v[k] / |weight_v[k]|.

    Spelt out because `torch.nn.utils.weight_norm` is deprecated and its successor renames the
    parameters.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """[B b] -> [B K]."""
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))
