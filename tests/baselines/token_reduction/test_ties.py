"""Equal scores come in the framework's own order, as in the published code.

Enough tokens for an order that differs from that of a stable sort.
"""

import torch

from baselines.token_reduction import evo_vit, smyrf, tome

TOKENS = 66


def test_equally_similar_tokens_of_tome():
    metric = torch.ones(2, TOKENS, 3)
    metric[:, 3::8] = -1.0  # so that half of the even tokens have no equal
    metric[:, ::4] = torch.tensor([1.0, 0.0, 0.0])
    matching = tome.match_bipartite(metric, 9)
    assert matching is not None
    unit = metric / metric.norm(dim=-1, keepdim=True)
    best = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).amax(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    assert torch.equal(matching.sources, 2 * order[:, :9])
    assert torch.equal(matching.unmerged, 2 * order[:, 9:])


def test_equally_attended_tokens_of_evo_vit():
    attention = (torch.arange(TOKENS) % 3).float().expand(2, -1)
    patches = torch.arange(TOKENS).float()[None, :, None].expand(2, -1, 1)
    found, _, order = evo_vit.sort_tokens(patches, attention)
    assert torch.equal(order, attention.argsort(dim=1, descending=True))
    assert torch.equal(found[..., 0], order.float())


def test_equal_queries_and_keys_of_smyrf():
    x = (torch.arange(TOKENS) % 3).float()[None, :, None].expand(2, -1, 4)
    gaussian = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    orders = smyrf.sort_by_hash(x, x, gaussian)
    for lifted, order in zip(smyrf.lift(x, x), orders, strict=True):
        assert torch.equal(order, (lifted @ gaussian).permute(2, 0, 1).argsort(dim=-1))
