"""What dropping tokens leaves alone: the options of the ViT, in training and in evaluation."""

import pytest
import torch

from baselines.evit import EViT
from baselines.evit.block import EViTBlock
from vit.block import Block
from vit.vision_transformer import VisionTransformer

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
OPTIONS = {
    "plain": {},
    "biases": {"qkv_bias": False},
    "mean": {"global_pool": "avg", "init_values": 0.5, "mlp_ratio": 2.0},
    "dropout": {"attn_drop_rate": 0.3, "drop_rate": 0.3},
    "stochastic depth": {"drop_path_rate": 0.5, "init_values": 0.5},
}


def net(**options) -> EViT:
    torch.manual_seed(0)
    made = EViT(**{**SMALL, "num_classes": 5, **options})
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def images(batch: int = 4, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_without_dropping_it_is_the_vit_of_these_options(options, training):
    """Of the same weights and draws; in training too."""
    ours = net(keep_rate=1.0, **options).train(training)
    twin = VisionTransformer(
        **SMALL, num_classes=5, class_position=True, drop_path_uniform=False, **options
    ).train(training)
    twin.load_state_dict(ours.state_dict())
    found = []
    for model in (ours, twin):
        torch.manual_seed(3)
        found.append(model(images()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_tokens_of_dropped_branches_go_through_as_they_came(fused):
    """Stochastic depth spares neither branch, and takes no part in which tokens are kept."""
    model = net(
        keep_rate=[0.5, 1, 0.5], fuse_token=fused, drop_path_rate=1 - 1e-9, drop_path_uniform=True
    ).train()
    x = images()
    tokens, (first, second) = model.kept_indices(x)
    came = model.embed(x)
    assert torch.equal(tokens[:, 0], came[:, 0])
    patches = came[:, 1:].gather(1, first[..., None].expand(-1, -1, 32))
    own = second < first.shape[1]  # the others are the fused token
    left = patches.gather(1, second.clamp(max=first.shape[1] - 1)[..., None].expand(-1, -1, 32))
    assert torch.equal(tokens[:, 1 : 1 + second.shape[1]][own], left[own])


def test_dropout_of_attention_changes_the_tokens_and_not_the_choice():
    """The importance is read from all the weights, as in evaluation."""
    model, x = net(keep_rate=[0.5, 1, 1], attn_drop_rate=0.5), images()
    still, kept = model.eval().kept_indices(x)
    moved, chosen = model.train().kept_indices(x)
    assert torch.equal(kept[0], chosen[0]) and not torch.allclose(still, moved, atol=1e-3)


def test_the_choice_is_by_the_class_tokens_attention():
    """Softmax of q k / sqrt(E), mean over heads, as a plain attention has it."""
    model, x = net(keep_rate=[0.5, 1, 1]).eval(), images()
    block = model.blocks[0]
    q, k, _ = block.attn.qkv(block.norm1(model.embed(x))).unflatten(-1, (3, 2, 16)).unbind(2)
    scores = torch.einsum("bhe,bnhe->bhn", q[:, 0], k) / 16**0.5
    shares = scores.softmax(-1).mean(1)[:, 1:]
    _, (kept,) = model.kept_indices(x)
    assert torch.equal(kept, shares.topk(8, dim=1).indices)


def test_counts_of_a_net_are_exact_or_as_published():
    rates = [0.55, 1, 1]
    assert net(keep_rate=rates).token_counts(100) == [55] * 3
    assert net(keep_rate=rates, exact_counts=False).token_counts(100) == [56] * 3
    assert net(keep_rate=rates, exact_counts=False, fuse_token=True).token_counts(100) == [57] * 3


def test_a_call_counts_the_fused_token_like_any_other():
    """So that 0.5 of 8 kept ones and the fused one are 5."""
    model = net(keep_rate=[0.5, 1, 0.5], fuse_token=True).eval()
    assert model.plan(16) == [8, None, 5]
    tokens, kept = model.kept_indices(images())
    assert [stage.shape[1] for stage in kept] == [8, 5] and tokens.shape[1] == 1 + 5 + 1


def test_a_block_takes_every_option_of_the_plain_one():
    """A factor of the logits too, which counts in the output and in the choice of tokens."""
    plain, ours = Block(32, num_heads=4, qk_scale=7.0), EViTBlock(32, num_heads=4, qk_scale=7.0)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(ours(x).x, plain(x))
    normed = plain.norm1(x)
    q, k, _ = plain.attn.qkv(normed).unflatten(-1, (3, 4, 8)).unbind(2)
    shares = (7.0 * torch.einsum("bhe,bnhe->bhn", q[:, 0], k)).softmax(-1).mean(1)[:, 1:]
    torch.testing.assert_close(ours.attn.select(normed, 3).importance, shares)


def test_a_block_builds_its_attention_once():
    """It draws no more random numbers than a plain one, and the same ones."""
    states = []
    for block_class in (Block, EViTBlock):
        torch.manual_seed(0)
        states.append(block_class(32, num_heads=4).state_dict())
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
