"""Training alone: stochastic depth, dropout, and which batch norms take statistics of all GPUs."""

import pytest
import torch
from torch import nn

from tests.baselines.dhvt.test_network import images, net


def test_dropped_branches_leave_tokens_as_they_came():
    """Stochastic depth rises from none in the first block to the rate in the last."""
    model = net(drop_path_rate=1 - 1e-9).train()
    first, last = model.features(images(), (0, -1))
    assert torch.equal(first.patches, last.patches) and torch.equal(first.cls, last.cls)
    first, last = model.eval().features(images(), (0, -1))
    assert not torch.equal(first.patches, last.patches)
    tokens = model.norm(model.embed(images()))
    assert not torch.equal(model.train().features(images(), (0,))[0].cls, tokens[:, 0])


@pytest.mark.parametrize("name", ["attn_drop_rate", "drop_rate", "drop_path_rate"])
def test_every_rate_drops_something_in_training_alone(name):
    model, x = net(**{name: 0.5}), images(8)
    assert torch.equal(model(x), net()(x))
    for part in model.modules():
        if not isinstance(part, nn.BatchNorm2d):  # whose statistics are not the question
            part.training = True
    assert not torch.allclose(model(x), model(x), atol=1e-4)


@pytest.mark.parametrize(
    ("choice", "stem", "blocks"),
    [("all", True, True), ("stem", True, False), ("none", False, False)],
)
def test_batch_norms_are_synchronised_where_that_is_asked_for(choice, stem, blocks, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    model = net(sync_batch_norm=choice)
    for part, wanted in ((model.patch_embed, stem), (model.blocks, blocks)):
        norms = [m for m in part.modules() if "BatchNorm" in type(m).__name__]
        assert norms and all(isinstance(m, nn.SyncBatchNorm) == wanted for m in norms)


def test_sizes_biases_and_norms_reach_every_block():
    model = net(mlp_ratio=2.0, qkv_bias=False, norm_eps=1e-3)
    for block in model.blocks:
        assert block.mlp.conv1.out_channels == 2 * model.embed_dim
        assert block.attn.qkv.bias is None
        assert block.norm1.eps == block.norm2.eps == model.norm.eps == 1e-3


def test_a_fresh_net_has_linear_layers_and_tokens_of_one_deviation():
    """0.02; convolutions are torch's."""
    model = net(embed_dim=64)
    for name, parameter in model.named_parameters():
        drawn = name.endswith(("cls_token", "pos_embed")) or "qkv.weight" in name
        if drawn or name.endswith(("proj.weight", "compress.weight", "head.weight")):
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.3), name
    assert float(model.blocks[0].mlp.conv1.weight.detach().std()) > 0.04


def test_a_feed_forward_of_no_channels_is_refused():
    with pytest.raises(ValueError, match="mlp_ratio leaves no channel of"):
        net(mlp_ratio=0)
