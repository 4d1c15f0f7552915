"""Channels that are split into heads and joined again are all there, with their gradients."""

import pytest
import torch

from octic import composed
from octic.heads import join_heads, split_heads

WIDTHS, HEADS = [1, 2], 2


def features(parts: int) -> torch.Tensor:
    """Features of distinct numbers [1 2 parts*D]."""
    width = parts * HEADS * sum(WIDTHS)
    return torch.arange(1.0, 2 * width + 1, dtype=torch.float64).view(1, 2, width) / 10


@pytest.mark.parametrize("parts", [1, 3])
def test_every_channel_goes_where_the_order_of_rows_parts_and_heads_says(parts):
    """Row by row, in a row part by part, in a part head by head."""
    x, start = features(parts), 0
    found = split_heads(x, HEADS, WIDTHS, parts)
    for index, width in enumerate(WIDTHS):
        first = sum(WIDTHS[:index])
        for part in range(parts):
            for head in range(HEADS):
                channels = found[part][:, :, head, first : first + width]
                assert torch.equal(channels, x[..., start : start + width])
                start += width
    assert start == x.shape[-1]
    assert torch.equal(join_heads(found, WIDTHS), x)


@pytest.mark.parametrize("parts", [1, 3])
def test_gradients_of_both_ways_and_theirs(parts):
    """By finite differences, once and twice, of every part."""
    x = features(parts).requires_grad_()
    tensors = [t.detach().requires_grad_() for t in split_heads(x, HEADS, WIDTHS, parts)]

    def split(x):
        return tuple(t.square() for t in split_heads(x, HEADS, WIDTHS, parts))

    def join(*tensors):
        return join_heads(tensors, WIDTHS).square()

    for function, inputs in ((split, [x]), (join, tensors)):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_a_bias_is_added_with_gradients_and_without(monkeypatch):
    """On the first channels, before they are split; also under torch.func and torch.export."""
    x, bias = features(3), torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    expected = x.clone()
    expected[..., :3] += bias
    trained = split_heads(x.requires_grad_(), HEADS, WIDTHS, 3, bias)
    with torch.no_grad():
        frozen = split_heads(x, HEADS, WIDTHS, 3, bias)
    monkeypatch.setattr(composed, "is_composed", lambda: True)
    for found in (trained, frozen, split_heads(x, HEADS, WIDTHS, 3, bias)):
        torch.testing.assert_close(join_heads(found, WIDTHS), expected, rtol=1e-12, atol=0)
