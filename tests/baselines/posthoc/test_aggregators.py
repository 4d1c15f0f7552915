"""Aggregators: one answer in whatever order the copies come; sound where the published is not."""

import pytest
import torch

from baselines.posthoc.aggregators import AGGREGATORS, FORMS, LEARNED, make_aggregator

DIM = 12


def make(name: str, form: str = "sound"):
    torch.manual_seed(0)
    return make_aggregator(name, DIM, form=form).double().eval()


def copies(count: int = 8) -> torch.Tensor:
    return torch.randn(
        3, count, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_order_of_copies_does_not_matter(name, form):
    net, z = make(name, form), copies()
    shuffled = z[:, torch.randperm(8, generator=torch.Generator().manual_seed(2))]
    torch.testing.assert_close(net(shuffled), net(z), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["mean", "max", "sum", "mean_logits", "most_certain", "learned_score"]
)
def test_one_copy_is_left_as_it_is(name):
    z = copies(1)
    torch.testing.assert_close(make(name)(z), z[:, 0])


def test_one_copy_of_most_probable_keeps_the_probabilities():
    """The published form divides by T // 2 = 0 there."""
    z = copies(1)
    torch.testing.assert_close(make("most_probable")(z).softmax(-1), z[:, 0].softmax(-1))


@pytest.mark.parametrize("form", FORMS)
def test_most_probable_does_not_underflow(form):
    """A product of 32 copies of 1,000 probabilities is 0 in float32, and NaN when normalised."""
    z = torch.randn(4, 32, 1000) * 4
    assert make_aggregator("most_probable", None, form=form)(z).isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_most_probable_loses_no_digits_to_the_copies_normalisers(form):
    """Of 32 copies of 1,000 classes these sum to some -220: beside them 1e-5 is lost in float32."""
    z = torch.randn(4, 32, 1000, dtype=torch.float64)
    net = make_aggregator("most_probable", None, form=form)
    exact = net(z)
    torch.testing.assert_close(net(z.float()).double(), exact, rtol=0, atol=4e-6)


def test_most_probable_and_the_mean_of_logits_agree_on_the_class():
    z = torch.randn(500, 8, DIM)
    found = [
        make_aggregator(n, None, form="sound")(z).argmax(-1)
        for n in ("most_probable", "mean_logits")
    ]
    assert torch.equal(*found)


def test_the_sound_forms_are_what_they_say():
    z = copies()
    p = make("most_probable")(z).exp()
    torch.testing.assert_close(p.sum(-1), torch.ones(3, dtype=torch.float64))
    weights = make("learned_score").weights(z)
    assert (weights > 0).all() and torch.allclose(weights.sum(1), torch.ones(3, 1).double())
    certain = make("most_certain")(z)
    assert all((row == z[i]).all(-1).any() for i, row in enumerate(certain)), "one copy's logits"
    patchwork = make("most_certain", "published")(z)
    assert not any((row == z[i]).all(-1).any() for i, row in enumerate(patchwork))


def test_the_surest_of_copies_that_are_sure_to_the_last_digit():
    """Probabilities of 1 are told apart, so that the choice is the same in any order."""
    z = torch.tensor([[[40.0, 0, 0], [0, 60.0, 0], [0, 0, 50.0]]])
    assert (z.softmax(dim=-1).amax(dim=-1) == 1).all()
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        assert torch.equal(make("most_certain")(z[:, order]), z[:, 1])
    assert torch.equal(make("most_certain")(z[..., :1]), z[:, 0, :1])  # one class


def test_parameters_are_as_many_as_published():
    counts = {
        n: sum(p.numel() for p in make_aggregator(n, 64, form="sound").parameters())
        for n in LEARNED
    }
    assert counts == {"learned_score": 8449, "learned_attention": 67136}


@pytest.mark.parametrize(
    ("name", "dim", "options", "said"),
    [
        ("median", 4, {}, "aggregator must be one of mean, max"),
        ("mean", 4, {"num_heads": 2}, "aggregator mean takes no num_heads"),
        ("learned_score", None, {}, "needs its option dim"),
        ("learned_attention", 4, {"layers": 2}, "takes no layers; known: num_heads, num_layers"),
        ("learned_attention", 4, {"num_heads": 0}, "num_heads must be a whole number from 1"),
        ("learned_attention", 6, {}, "do not split into 4 heads"),
    ],
)
def test_mistakes_are_one_line(name, dim, options, said):
    with pytest.raises(ValueError, match=said):
        make_aggregator(name, dim, form="sound", **options)
    with pytest.raises(ValueError, match="form must be one of .*not 'fast'"):
        make_aggregator("mean", None, form="fast")
