"""Heads of the attentive probe: linear ones on one vector, attentive ones on all patches.

Letters: H heads, B batch, N patches, D channels, A attention heads of d channels, C classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.probes.linear_heads import check_same_heads, pooled_patches
from vit.backbone import Features

REPRESENTATIONS = ("cls", "avg_patch", "patch")
INIT_STD = 0.02
HEAD_DIM = 64


class Head(NamedTuple):
    """One point of the grid."""

    representation: str
    lr: float
    weight_decay: float

    @property
    def name(self) -> str:
        """Its name in files: a module name, so without points."""
        return f"{self.representation}_lr_{self.lr:g}_wd_{self.weight_decay:g}".replace(".", "_")


def make_grid(
    representations: Sequence[str], rates: Sequence[float], weight_decays: Sequence[float]
) -> list[Head]:
    """All heads: representations, then rates, then weight decays.

    ValueError for values that are alike in the six digits of a head's name.
    """
    for key, values in (("learning_rates", rates), ("weight_decays", weight_decays)):
        if len({f"{value:g}" for value in values}) < len(values):
            raise ValueError(f"{key}: two of {list(values)} are alike in their first six digits")
    return [
        Head(representation, rate, weight_decay)
        for representation in representations
        for rate in rates
        for weight_decay in weight_decays
    ]


def num_attention_heads(embed_dim: int) -> int:
    """One per 64 channels, at least one; fewer where these do not divide the channels."""
    most = max(1, embed_dim // HEAD_DIM)
    return next(count for count in range(most, 0, -1) if embed_dim % count == 0)


def attend(tokens: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Logits [H B C] of attentive heads on tokens [B N D], of stacked parameters.

    query_token [H D], kv.weight [H 2D D], kv.bias [H 2D], linear.weight [H C D], linear.bias [H C].
    Every attention head weighs the tokens by softmax(q . k / sqrt(d)) and sums their values; all
    sums together are classified. Keys and values are never made: a query is taken through the key's
    weights once instead, and the weighted sum of tokens through the value's, N times less work. The
    keys' bias shifts all scores of a query alike, which the softmax does not see.
    """
    query, weight = state["query_token"], state["kv.weight"]
    heads, dim = query.shape
    parts = num_attention_heads(dim)
    keys, values = weight.view(heads, 2, parts, dim // parts, dim).unbind(1)  # [H A d D]
    query = query.view(heads, parts, 1, dim // parts) * (dim // parts) ** -0.5
    asked = (query @ keys).flatten(0, 2)  # [HA D]
    scores = (tokens @ asked.T).softmax(dim=1)  # [B N HA]
    pooled = (scores.mT @ tokens).unflatten(1, (heads, parts))  # [B H A D]
    bias = state["kv.bias"].view(heads, 2, parts, -1)[:, 1]
    summed = torch.einsum("bhax,hadx->bhad", pooled, values) + bias
    logits = torch.einsum("bhx,hcx->hbc", summed.flatten(2), state["linear.weight"])
    return logits + state["linear.bias"][:, None]


class AttentiveHeads(nn.Module):
    """The grid's heads, each with parameters of its own, because AdamW trains each at its own rate.

    Those of one representation are stacked for a batch and go through one product. The losses count
    alike: their mean is minimised.
    """

    loss_weights: Tensor

    def __init__(
        self,
        grid: Sequence[Head],
        *,
        embed_dim: int,
        num_classes: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.num_classes = list(grid), num_classes
        self.layers: tuple[int, ...] = (-1,)
        self.names = [head.name for head in grid]
        assert len(set(self.names)) == len(self.names)
        self.heads = nn.ModuleDict(
            {
                head.name: _PatchHead(embed_dim, num_classes)
                if head.representation == "patch"
                else _VectorHead(embed_dim, num_classes)
                for head in grid
            }
        )
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=INIT_STD, generator=generator)
        self.register_buffer("loss_weights", torch.full((len(grid),), 1 / len(grid)), False)

    def read(self, features: Sequence[Features]) -> dict[str, Tensor]:
        """What each representation of the grid reads: a vector [B D], or all patches [B N D]."""
        last, asked = features[-1], {head.representation for head in self.grid}
        inputs = {}
        if "cls" in asked:
            inputs["cls"] = last.cls.float()
        if "avg_patch" in asked:
            inputs["avg_patch"] = pooled_patches(last).float()
        if "patch" in asked:
            pooled_patches(last)
            assert last.patches is not None
            inputs["patch"] = last.patches.flatten(1, 2).float()
        return inputs

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits [H B C], heads in the order of the grid."""
        logits = []
        for representation in dict.fromkeys(head.representation for head in self.grid):
            state = self._stacked(representation)
            x = inputs[representation]
            logits.append(attend(x, state) if representation == "patch" else _classify(x, state))
        return torch.cat(logits)

    def param_groups(self) -> Iterator[dict]:
        """Groups for AdamW: each head at its own rate, biases without weight decay."""
        for head in self.grid:
            named = dict(self.heads[head.name].named_parameters())
            biases = [value for name, value in named.items() if name.endswith("bias")]
            weights = [value for name, value in named.items() if not name.endswith("bias")]
            rate = {"lr": head.lr, "initial_lr": head.lr}
            yield {"params": weights, "weight_decay": head.weight_decay, **rate}
            yield {"params": biases, "weight_decay": 0.0, **rate}

    def published_state(self) -> dict[str, Tensor]:
        """All parameters by name."""
        return self.heads.state_dict()

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Take them back; UserError for another grid, width or number of classes."""
        check_same_heads(state, self.published_state())
        self.heads.load_state_dict(dict(state))

    def _stacked(self, representation: str) -> dict[str, Tensor]:
        heads = [
            dict(self.heads[head.name].named_parameters())
            for head in self.grid
            if head.representation == representation
        ]
        return {name: torch.stack([head[name] for head in heads]) for name in heads[0]}


class _VectorHead(nn.Module):
    def __init__(self, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(embed_dim, num_classes)


class _PatchHead(_VectorHead):
    def __init__(self, embed_dim: int, num_classes: int) -> None:
        super().__init__(embed_dim, num_classes)
        self.query_token = nn.Parameter(torch.empty(embed_dim))
        self.kv = nn.Linear(embed_dim, 2 * embed_dim)


def _classify(x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    weight, bias = state["linear.weight"], state["linear.bias"]
    return (
        F.linear(x, weight.flatten(0, 1), bias.flatten()).unflatten(1, bias.shape).transpose(0, 1)
    )
