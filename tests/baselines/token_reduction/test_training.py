"""Training, recomputation, compilation, half precision."""

import pytest
import torch

from baselines.token_reduction.options import FORMS
from baselines.token_reduction.presets import make_reducer
from baselines.token_reduction.reduced import Reduced
from tests.baselines.token_reduction.toys import METHODS, images, net_of, reducer

# Shapes stand still in all but ACT, whose clusters are counted, and ATS that drops.
STILL = {**{method: {} for method in METHODS if method != "act"}, "ats": {"drop_tokens": False}}


def gradients(wrapped):
    wrapped.zero_grad()
    torch.manual_seed(1)
    wrapped(images()).square().sum().backward()
    return {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", ["timm", "hybrid"])
def test_every_parameter_is_trained(host, method):
    wrapped = Reduced(net_of(host), reducer(method)).train()
    found = gradients(wrapped)
    assert set(found) == {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert all(g.isfinite().all() for g in found.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_recomputation_gives_the_same_gradients(method, form):
    """The second run of a block finds the state, and the draws, that the first one found."""
    wrapped = Reduced(net_of("ours", drop_path_rate=0.2), reducer(method, form=form)).train()
    plain = gradients(wrapped)
    wrapped.set_grad_checkpointing()
    recomputed = gradients(wrapped)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("method", STILL)
@pytest.mark.parametrize("host", ["timm", "hybrid"])
def test_whole_graphs_where_shapes_stand_still(host, method):
    wrapped = Reduced(net_of(host), reducer(method, **STILL[method])).eval()
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(wrapped, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images()), wrapped(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["act", "smyrf"])
def test_dropout_of_weights_is_refused_where_clusters_share_them(method):
    wrapped = Reduced(net_of("timm", attn_drop_rate=0.1), make_reducer(method)).train()
    with pytest.raises(ValueError, match="trains without dropout of attention weights"):
        wrapped(images())
    assert wrapped.eval()(images()).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method):
    wrapped = Reduced(net_of("dinov2"), reducer(method)).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = wrapped.features(images())[0]
    assert found.cls.isfinite().all() and found.patches.isfinite().all()
    wrapped.bfloat16()
    assert wrapped(images().bfloat16()).isfinite().all()


def test_sequences_need_no_attention_but_dropping_ones_obey_dropout():
    """EViT in training mode draws dropout on the weights it uses, not on its scores."""
    wrapped = Reduced(net_of("timm", attn_drop_rate=0.5), make_reducer("evit", locations=[0]))
    first = wrapped.train().inspect(images()).record["block0.kept"]
    second = wrapped.inspect(images()).record["block0.kept"]
    assert torch.equal(first, second)
