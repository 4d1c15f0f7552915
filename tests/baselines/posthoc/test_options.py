"""What the options of a symmetrised net promise, alone and with each other."""

import pytest
import torch

from baselines.posthoc.aggregators import Aggregator
from baselines.posthoc.symmetrized import Symmetrized, symmetrized
from tests.baselines.posthoc.toys import SMALL, images, make
from utils.config.signature import keywords_of
from utils.symmetry import transform_image


def test_a_config_hands_every_option_on():
    """What is given beside a backbone to be built means the same as beside one that is there."""
    options = {
        "group": "D8",
        "aggregator": "learned_score",
        "form": "published",
        "chunk": 3,
        "trained": "head",
        "one_copy": True,
        "output": "embedding",
        "fill": [0.5, 0.0, -1.0],
        "disc_mask": True,
        "interpolation": "nearest",
        "rectangular": "crop",
        "aggregator_options": {"hidden_dim": 7},
    }
    known, own = keywords_of(symmetrized), keywords_of(Symmetrized)
    assert {"backbone", *options} == set(own)
    assert all(known[name].default == own[name].default for name in options)
    direct, handed = Symmetrized(make("timm"), **options), symmetrized(make("timm"), **options)
    assert vars(handed.group) == vars(direct.group)
    for name in ("chunk", "trained", "one_copy", "output"):
        assert getattr(handed, name) == options[name]
    assert handed.aggregator.form == direct.aggregator.form == "published"
    assert [p.shape for p in handed.parameters()] == [p.shape for p in direct.parameters()]
    assert [p.requires_grad for p in handed.parameters()] == [
        p.requires_grad for p in direct.parameters()
    ]


@pytest.mark.parametrize("disc_mask", [False, True])
@pytest.mark.parametrize("rectangular", ["refuse", "pad"])
def test_colours_and_masks_reach_the_copies(disc_mask, rectangular):
    """All copies of a flat image of the fill colour are alike: the logits are the net's own."""
    options = {"fill": [1.0, 2.0, 3.0], "disc_mask": disc_mask, "rectangular": rectangular}
    flat = torch.tensor([1.0, 2.0, 3.0])[None, :, None, None].expand(2, 3, 32, 32)
    net = Symmetrized(make("timm"), "D8", **options).eval()
    torch.testing.assert_close(net(flat), net.model(flat))
    x = images()
    bare = Symmetrized(make("timm"), "D8").eval()
    assert (net(x) - bare(x)).abs().max() > 1e-3
    if rectangular == "pad":
        torch.testing.assert_close(net(flat[..., 8:24]), net.model(flat))
    outside = x.clone()
    outside[..., 0, 0] = 9.0  # a corner, which the disc leaves out
    assert torch.allclose(net(outside), net(x)) == disc_mask


@pytest.mark.parametrize("aggregator", ["mean", "max", "sum", "most_certain", "learned_score"])
def test_embeddings_and_class_tokens_are_joined_as_the_aggregator_says(aggregator):
    """By the mean where it reads logits; a learned one never reads tokens of other blocks."""
    net, x = Symmetrized(make("octic"), "C4", aggregator).eval(), images()
    copies = net.embeddings(x)
    joined = {"max": copies.amax(dim=1), "sum": copies.sum(dim=1)}
    if aggregator == "learned_score":
        joined[aggregator] = net.aggregator(copies)
    expected = joined.get(aggregator, copies.mean(dim=1))
    torch.testing.assert_close(net.embedding(x), expected)
    tokens = torch.stack([net.model.features(net.group.copy(x, i))[0].cls for i in range(4)], dim=1)
    joined = {"max": tokens.amax(dim=1), "sum": tokens.sum(dim=1)}
    (found,) = net.features(x)
    torch.testing.assert_close(found.cls, joined.get(aggregator, tokens.mean(dim=1)))


@pytest.mark.parametrize("trained", ["none", "aggregator", "head", "all"])
def test_features_of_a_frozen_backbone_take_no_gradient(trained):
    net = Symmetrized(make("timm adapter"), "C4", "learned_score", trained=trained).train()
    (found,) = net.features(images())
    assert found.cls.requires_grad == found.patches.requires_grad == (trained == "all")


@pytest.mark.parametrize("output", ["logits", "embedding", "map"])
def test_chunks_and_one_copy_leave_judging_alone(output):
    """Together with every output: the net in evaluation joins all copies, and stays."""
    whole = Symmetrized(make("octic"), "D4", output=output).eval()
    net = Symmetrized(make("octic"), "D4", output=output, chunk=3, one_copy=True).eval()
    x = images()
    torch.testing.assert_close(net(x), whole(x), rtol=1e-5, atol=1e-5)
    if output != "map":
        torch.testing.assert_close(net(transform_image(x, "r")), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["octic", "timm", "timm adapter", "small"])
def test_sizes_are_the_backbones(kind):
    """As probes and timm's transforms read them, whatever is wrapped."""
    net = Symmetrized(make(kind))
    assert net.img_size == (32, 32) and net.in_chans == 3 and net.embed_dim == 32
    assert net.pretrained_cfg["input_size"] == (3, 32, 32)
    classifier = net.get_submodule(net.pretrained_cfg["classifier"])
    assert isinstance(classifier, torch.nn.Linear) and classifier.out_features == net.num_classes
    if kind != "timm":
        assert (net.patch_size, net.depth) == (SMALL["patch_size"], SMALL["depth"])
        assert net.switch == net.depth


def test_the_small_net_drops_out_in_training_alone():
    net, x = make("small"), images()
    tokens = net.train().embed(x)
    assert 0.02 < float((tokens == 0).float().mean()) < 0.3
    assert (net.eval().embed(x) != 0).all() and torch.equal(net(x), net(x))


def test_an_own_aggregator_of_an_unknown_level_is_refused():
    """Else logits would be asked for, and embeddings joined."""

    class Median(Aggregator):
        level = "logits"

        def forward(self, z):
            return z.median(dim=1).values

    with pytest.raises(ValueError, match="level of Median must be one of embedding, logit, not"):
        Symmetrized(make("timm"), aggregator=Median())
    Median.level = "logit"
    assert Symmetrized(make("timm"), aggregator=Median()).aggregator.level == "logit"


@pytest.mark.parametrize(
    ("aggregator", "options", "said"),
    [
        ("learned_score", {"hidden_dim": 2.5}, "aggregator_options.hidden_dim must be a whole"),
        ("learned_score", {"dim": 0}, "aggregator_options.dim must be a whole number from 1"),
        ("learned_attention", {"dim": 16.0}, "aggregator_options.dim must be a whole number"),
        ("learned_score", {"form": "published"}, "form is a keyword of its own"),
    ],
)
def test_an_option_without_a_meaning_is_refused_in_one_line(aggregator, options, said):
    with pytest.raises(ValueError, match=said):
        Symmetrized(make("timm"), aggregator=aggregator, aggregator_options=options)
