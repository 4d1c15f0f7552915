"""Packed attention keeps sequences apart, on every device that is here."""

import pytest
import torch
from torch import nn

from octic.layers import OcticAttention
from vit.attention import Attention, attend
from vit.packing import pack, unpack


def test_packed_equals_looped() -> None:
    """Sequences of three lengths in one tensor attend to themselves alone."""
    attention = Attention(32, num_heads=4).double()
    batches = [torch.randn(2, 5, 32).double(), torch.randn(3, 1, 32).double()]
    packed, packing = pack(batches)
    assert packing.longest == 5 and packing.num_sequences == 5
    assert packing.offsets.tolist() == [0, 5, 10, 11, 12, 13]
    for ours, batch in zip(
        unpack(attention(packed, packing), packing.groups), batches, strict=True
    ):
        torch.testing.assert_close(ours, attention(batch))


def test_equals_timm() -> None:
    """The same projections give timm's attention."""
    from timm.layers import Attention as TimmAttention

    ours, timms = Attention(32, num_heads=4), TimmAttention(32, num_heads=4, qkv_bias=True)
    ours.load_state_dict(timms.state_dict())
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(ours(x), timms(x))


def test_a_scale_of_the_logits_takes_the_place_of_the_usual_one() -> None:
    """It is as if queries were so much longer."""
    usual, own = Attention(32, num_heads=4), Attention(32, num_heads=4, qk_scale=0.5)
    own.load_state_dict(usual.state_dict())
    with torch.no_grad():
        usual.qkv.weight[:32] *= 0.5 * 8**0.5
        usual.qkv.bias[:32] *= 0.5 * 8**0.5
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(own(x), usual(x))


def test_varlen_refuses_what_it_cannot_do() -> None:
    """Dropout, and tensors that its kernel does not take; nothing is left out in silence."""
    x, packing = pack([torch.randn(1, 4, 2, 8), torch.randn(1, 2, 2, 8)])
    with pytest.raises(ValueError, match='needs CUDA and half precision, not cpu .* "auto" takes'):
        attend(x, x, x, packing, backend="varlen")
    with pytest.raises(ValueError, match='has no dropout, and 0.1 is asked for; backend "auto"'):
        attend(x, x, x, packing, backend="varlen", dropout=0.1)
    assert attend(x, x, x, packing, backend="auto", dropout=0.1).shape == x.shape


@pytest.mark.parametrize("kind", [Attention, OcticAttention])
def test_a_dropout_that_cannot_be_is_refused_before_training(kind: type[nn.Module]) -> None:
    """In evaluation nothing is dropped, so that a wrong share would show at the first step."""
    for share in (-0.1, 2.0):
        with pytest.raises(ValueError, match=f"attn_drop {share} is not in"):
            kind(64, num_heads=2, attn_drop=share)
    assert kind(64, num_heads=2, attn_drop=1.0).attn_drop == 1.0


def test_unknown_backend_and_missing_package() -> None:
    """Each says what is known or what to install."""
    with pytest.raises(ValueError, match="known: auto, sdpa, varlen, xformers"):
        Attention(32, backend="flash")
    try:
        import xformers  # noqa: F401
    except ImportError:
        x, packing = pack([torch.randn(1, 4, 2, 8), torch.randn(1, 2, 2, 8)])
        with pytest.raises(ValueError, match="pip install xformers"):
            attend(x, x, x, packing, backend="xformers")
