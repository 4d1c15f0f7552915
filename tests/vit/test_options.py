"""Options of a network act on the parts that they name, in training or always, and on no other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octic.vision_transformer import OcticVisionTransformer
from vit.vision_transformer import VisionTransformer

NETS = {"plain": VisionTransformer, "octic": OcticVisionTransformer}
SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4}
SIZES |= {"num_heads": 2, "num_classes": 5, "init_values": 0.5}
OCTIC, BLOCKS = {0, 1}, {0, 1, 2, 3}


def told(value: Any) -> str:
    """The same in every process, as the order of a set is not."""
    return str(sorted(value, key=str) if isinstance(value, set) else value)


def make(kind: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    net = NETS[kind](**SIZES, **options).double()
    for parameter in net.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return net


def parts_of(net: Any) -> dict[int | str, Callable[[], Tensor]]:
    """What every part of a network makes of the same input: blocks by number, others by name."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(8, 5, SIZES["embed_dim"], dtype=torch.float64, generator=generator)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=generator)
    blocks = {index: lambda block=block: block(tokens) for index, block in enumerate(net.blocks)}
    return blocks | {
        "patch_embed": lambda: net.patch_embed(images),
        "positions": lambda: net.patch_positions(5, 5),
        "norm": lambda: net.norm(tokens),
        "head": lambda: net.forward_head(tokens[..., : net.embed_dim]),
    }


def changed(net: nn.Module, other: nn.Module) -> set[int | str]:
    """The parts in which two networks of the same weights differ."""
    found = set()
    for (name, ours), theirs in zip(parts_of(net).items(), parts_of(other).values(), strict=True):
        results = []
        for run in (ours, theirs):
            torch.manual_seed(2)
            results.append(run())
        if not torch.equal(*results):
            found.add(name)
    return found


@pytest.mark.parametrize(
    ("kind", "given", "option", "parts"),
    [
        ("octic", {}, {"octic_norm_eps": 1.0}, OCTIC),
        ("octic", {}, {"irrep_weights": {"E": 4.0}}, OCTIC),
        ("octic", {}, {"norm_eps": 1.0}, {2, 3, "norm"}),
        ("octic", {"invariant_at": "head"}, {"octic_norm_eps": 1.0}, BLOCKS | {"norm"}),
        ("octic", {"invariant_at": "head"}, {"irrep_weights": {"E": 4.0}}, BLOCKS | {"norm"}),
        ("octic", {}, {"scaled_patch_bias": True}, {"patch_embed"}),
        ("plain", {}, {"norm_eps": 1.0}, BLOCKS | {"norm"}),
        ("plain", {}, {"position_offset": 0.1}, {"positions"}),
        ("plain", {}, {"position_antialias": True}, {"positions"}),
    ],
    ids=told,
)
def test_an_option_acts_where_it_says(kind, given, option, parts):
    net, other = make(kind, given), make(kind, given | option)
    assert changed(net, other) == changed(net.eval(), other.eval()) == parts


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize(
    ("given", "option", "parts"),
    [
        ({}, {"drop_rate": 0.5}, {"head"}),
        ({}, {"attn_drop_rate": 0.5}, BLOCKS),
        ({}, {"drop_path_rate": 0.5}, BLOCKS),
        ({}, {"drop_path_rate": 0.5, "drop_path_uniform": False}, BLOCKS - {0}),
        ({"drop_path_rate": 0.5}, {"drop_path_mode": "subset"}, BLOCKS),
    ],
    ids=told,
)
def test_what_is_dropped_is_dropped_in_training_alone(kind, given, option, parts):
    net, other = make(kind, given), make(kind, given | option)
    assert changed(net, other) == parts
    assert changed(net.eval(), other.eval()) == set()
