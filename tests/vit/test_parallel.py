"""Parallel branches: both read the same tokens, each is dropped by itself, published names load."""

import pytest
import timm
import torch
from torch import nn

import vit
from vit.parallel import ParallelBlock
from vit.weights import load_state

# Registered and impossible to build in the published code of Flopping for FLOPs.
SEVEN = {
    "deit_small_patch16_36": 64_637_416,
    "deit_base_patch16_36x1": 256_675_816,
    "deit_small_patch16_18x2": 64_637_416,
    "deit_small_patch16_18x2_LS": 64_665_064,
    "deit_base_patch16_18x2": 256_675_816,
    "deit_base_patch16_18x2_LS": 256_731_112,
    "deit_huge_patch14_26x2_LS": 1_025_726_440,
}


def make() -> ParallelBlock:
    block = ParallelBlock(16, num_heads=2, init_values=1.0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def test_both_branches_read_the_same_tokens() -> None:
    """x + f(x) + g(x), not x + f(x) + g(x + f(x))."""
    block, x = make().eval(), torch.randn(2, 5, 16)
    attended = x + block._mix_tokens(x, None) + block._mix_tokens_too(x, None)
    expected = (
        attended + block._mix_channels(attended, None) + block._mix_channels_too(attended, None)
    )
    torch.testing.assert_close(block(x), expected)


def test_branches_are_dropped_independently() -> None:
    """Of both, either or none: four outcomes of the attention half."""
    block, x = make(), torch.randn(64, 5, 16)
    block.drop_path_rate = 0.5
    for mlp in (block.mlp, block.mlp1):
        nn.init.zeros_(mlp.fc2.weight)
        nn.init.zeros_(mlp.fc2.bias)
    update = block.train()(x) - x
    first, second = 2 * block._mix_tokens(x, None), 2 * block._mix_tokens_too(x, None)
    seen = set()
    for index in range(64):
        for a in (0, 1):
            for b in (0, 1):
                mixed = a * first[index] + b * second[index]
                if torch.allclose(update[index], mixed, atol=1e-4):
                    seen.add((a, b))
    assert len(seen) == 4
    with pytest.raises(ValueError, match='use "sample"'):
        ParallelBlock(16, num_heads=2, drop_path_mode="subset")


@pytest.mark.parametrize("name", SEVEN)
def test_the_seven_can_be_built(name: str) -> None:
    """With as many parameters as the deep nets they are the parallel form of."""
    with torch.device("meta"):
        net = timm.create_model(name)
    assert sum(p.numel() for p in net.parameters()) == SEVEN[name]
    assert name in vit.models.default_cfgs


def test_published_names_load() -> None:
    """DeiT III's gamma_1_1 and gamma_2_1 are the layer scales of the second branches."""
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    net = timm.create_model("deit_small_patch16_18x2_LS", **small)
    state = {}
    for name, tensor in net.state_dict().items():
        for ours, theirs in (("1", "1"), ("2", "2"), ("11", "1_1"), ("21", "2_1")):
            name = name.replace(f".ls{ours}.gamma", f".gamma_{theirs}")
        state[name] = torch.randn_like(tensor)
    load_state(net, state)
    assert torch.equal(net.blocks[1].ls21.gamma, state["blocks.1.gamma_2_1"])
