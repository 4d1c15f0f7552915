"""Packed attention keeps sequences apart, on every device that is here."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from octic.attention import OcticAttention
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
    with pytest.raises(
        ValueError, match='needs CUDA .* half precision .* not cpu, .* "auto" takes'
    ):
        attend(x, x, x, packing, backend="varlen")
    with pytest.raises(ValueError, match='has no dropout, and 0.1 is asked for; backend "auto"'):
        attend(x, x, x, packing, backend="varlen", dropout=0.1)
    assert attend(x, x, x, packing, backend="auto", dropout=0.1).shape == x.shape


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "taken"),
    [
        ((8, 0), torch.bfloat16, 64, True),
        ((9, 0), torch.float16, 256, True),
        ((9, 0), torch.float32, 64, False),
        ((7, 5), torch.float16, 64, False),
        ((9, 0), torch.bfloat16, 12, False),
        ((9, 0), torch.bfloat16, 264, False),
    ],
)
def test_auto_takes_varlen_where_its_kernel_runs(
    capability: tuple[int, int],
    dtype: torch.dtype,
    width: int,
    taken: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By tensors without data; elsewhere the kernel would end the training with an error."""
    found = []

    def varlen(q: Tensor, *_: object) -> Tensor:
        found.append(q)
        return q

    monkeypatch.setattr("vit.attention._varlen", varlen)
    monkeypatch.setattr("vit.attention._capability", lambda _: capability)
    with FakeTensorMode():
        parts = [torch.empty(2, tokens, 2, width, dtype=dtype, device="cuda") for tokens in (5, 3)]
        x, packing = pack(parts)
        out = attend(x, x, x, packing)
    assert out.shape == (1, 16, 2, width) and bool(found) is taken


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
