"""The head has the published names and norms."""

import pytest
import torch
from torch.nn import functional as F

from dinov2.head import DINOHead


def make_head(**keywords) -> DINOHead:
    return DINOHead(6, num_prototypes=10, hidden_dim=12, bottleneck_dim=4, **keywords)


def test_published_names():
    names = [f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    assert list(make_head().state_dict()) == [*names, "last_layer.weight_g", "last_layer.weight_v"]
    assert list(make_head(num_layers=1).state_dict())[:2] == ["mlp.weight", "mlp.bias"]


def test_a_head_starts_small_without_biases_and_with_prototypes_of_length_one():
    head = DINOHead(64, num_prototypes=100, hidden_dim=96, bottleneck_dim=64)
    for name, values in head.mlp.named_parameters():
        assert values.std().item() == pytest.approx(0.02 * name.endswith("weight"), rel=0.1), name
    assert torch.equal(head.last_layer.weight_g, torch.ones(100, 1))
    assert head.last_layer.weight_v.std() > 0


def test_logits_are_cosines_times_lengths():
    head, x = make_head(), torch.randn(5, 6)
    assert head(x).abs().max() <= 1 + 1e-6
    head.last_layer.weight_g.data.mul_(3)
    scaled = head(x)
    head.last_layer.weight_v.data.mul_(7)
    torch.testing.assert_close(head(x), scaled)


def test_each_token_has_its_cosines_with_the_prototypes_whatever_its_batch():
    head, x = make_head(), torch.randn(5, 6)
    cosines = F.cosine_similarity(head.mlp(x)[:, None], head.last_layer.weight_v, dim=-1)
    torch.testing.assert_close(head(x), cosines, rtol=1e-4, atol=1e-5)


def test_a_head_without_layers_or_prototypes_is_refused():
    with pytest.raises(ValueError, match="num_layers must be a whole number from 1"):
        make_head(num_layers=0)
    with pytest.raises(ValueError, match="num_prototypes must be a whole number from 1"):
        DINOHead(6, num_prototypes=0)


def test_without_biases_only_the_direction_of_a_token_counts_in_one_layer():
    head, x = make_head(num_layers=1, mlp_bias=False), torch.randn(5, 6)
    assert [name for name, _ in head.named_parameters() if name.endswith("bias")] == []
    torch.testing.assert_close(head(7 * x), head(x))


def test_an_empty_batch_passes():
    assert make_head()(torch.empty(0, 6)).shape == (0, 10)
