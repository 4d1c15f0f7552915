"""A symmetrised classifier: f(g x) = f(x), as a map f(g x) = g f(x), and nothing else changed."""

import copy

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from baselines.flopping.plain import PlainResMlp
from baselines.gevit import GEViT
from baselines.gevit import models as gevit
from baselines.posthoc.aggregators import AGGREGATORS, LEARNED, Aggregator
from baselines.posthoc.split import find_split
from baselines.posthoc.symmetrized import Symmetrized, symmetrized
from evaluation.symmetry.equivariance import measure, worst_error
from tests.baselines.posthoc.toys import CLASSES, KINDS, SMALL, images, make
from tests.published_names import published_posthoc_name
from utils.config.build import build
from utils.errors import UserError
from utils.symmetry import transform_image, transform_map
from vit.weights import load_state, load_weights

kinds = pytest.mark.parametrize("kind", KINDS)


@torch.no_grad()
def error_of(net: Symmetrized, x: torch.Tensor) -> float:
    still = net(x)
    moved = [net(transform_image(x, element.name)) for element in net.group.elements]
    return max(float((found - still).abs().max()) for found in moved)


GROUPS = ("mirror", "C4", "D4", "C8", "D8")
WRAPPED = [(kind, group) for kind in ("octic", "timm") for group in GROUPS]
WRAPPED += [("torchvision", "D4"), ("torchvision", "C8")]


@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize(("kind", "group"), WRAPPED)
def test_logits_stay_under_the_group(kind, group, aggregator):
    net = Symmetrized(make(kind), group, aggregator).eval()
    assert error_of(net, images(2)) < 1e-5


@kinds
def test_logits_of_every_kind_stay(kind):
    backbone = make(kind)
    assert error_of(Symmetrized(backbone).eval(), images()) < 1e-5


def test_the_backbone_alone_does_not_stay():
    assert error_of(Symmetrized(make("timm"), "C1").eval(), images()) == 0
    plain, x = make("timm").eval(), images()
    assert (plain(x) - plain(transform_image(x, "r"))).abs().max() > 1e-2


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_half_precision_stays_within_its_rounding(aggregator):
    """bfloat16 keeps three digits; a sum of eight copies is eight times as large."""
    net = Symmetrized(make("timm"), "D4", aggregator).eval().bfloat16()
    assert error_of(net, images().bfloat16()) < (0.25 if aggregator == "sum" else 0.1)


@kinds
@pytest.mark.parametrize(
    "aggregator", ["mean", "max", "sum", "mean_logits", "most_certain", "learned_score"]
)
def test_one_copy_is_the_backbone(kind, aggregator):
    backbone, x = make(kind), images()
    net = Symmetrized(backbone, "C1", aggregator).eval()
    with torch.no_grad():
        torch.testing.assert_close(net(x), net.model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("chunk", [1, 3, 8, 20])
def test_chunks_change_nothing(aggregator, chunk):
    backbone, x = make("timm"), images()
    torch.manual_seed(1)
    whole = Symmetrized(backbone, "D4", aggregator).eval()
    parts = Symmetrized(backbone, "D4", aggregator, chunk=chunk).eval()
    parts.aggregator.load_state_dict(whole.aggregator.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(parts(x), whole(x), rtol=1e-5, atol=1e-6)


def test_chunks_of_maps_change_nothing():
    backbone, x = make("octic"), images()
    whole, parts = (Symmetrized(backbone, chunk=c).eval().features(x, (0, -1)) for c in (0, 3))
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours.cls, theirs.cls)
        torch.testing.assert_close(ours.patches, theirs.patches)


# Maps.


@pytest.mark.parametrize("kind", ["octic", "timm adapter", "torchvision adapter", "small"])
@pytest.mark.parametrize("group", ["D4", "C4", "C8", "mirror"])
def test_maps_turn_along_and_class_tokens_stay(kind, group):
    net, x = Symmetrized(make(kind), group).eval(), images()
    with torch.no_grad():
        for layer in (0, -1):
            still = net.features(x, (layer,))[0]
            for element in net.group.elements:
                found = net.features(transform_image(x, element.name), (layer,))[0]
                expected = transform_map(still.patches, element.name)
                torch.testing.assert_close(found.patches, expected, rtol=1e-4, atol=2e-5)
                torch.testing.assert_close(found.cls, still.cls, rtol=1e-4, atol=2e-5)


def test_a_map_of_ones_stays_one_whatever_the_angles():
    """Cells that a turned map does not cover are not averaged in."""

    class Ones(nn.Module):
        embed_dim, patch_size = 4, 8

        def features(self, x, layers=(-1,)):
            from vit.backbone import Features

            return [Features(torch.ones(len(x), 4), torch.ones(len(x), 4, 4, 4)) for _ in layers]

        def forward(self, x):
            return x.mean(dim=(2, 3))

    found = Symmetrized(Ones(), "D16", output="map")(images())
    torch.testing.assert_close(found, torch.ones(3, 4, 4, 4))


def test_outputs_are_what_they_say():
    x = images()
    shapes = {"logits": (3, CLASSES), "embedding": (3, 32), "map": (3, 4, 4, 32)}
    for output, shape in shapes.items():
        net = Symmetrized(make("octic"), output=output).eval()
        assert net(x).shape == shape and net.num_classes == (CLASSES if output == "logits" else 0)


def test_a_report_of_equivariance_holds_the_net_to_its_law():
    """`evaluation.symmetry.equivariance` finds the group, and every map obeys it."""
    net = Symmetrized(make("octic"), "D4").eval()
    measured = measure(net, images())
    layers = {name: layer.errors for name, layer in measured.layers.items() if layer.octic}
    assert list(layers) == ["features.0", "features.1"] and worst_error(layers) < 1e-5
    assert max(error.cls for error in measured.turns.values()) < 1e-5


def test_a_net_without_features_says_what_has_them():
    with pytest.raises(ValueError, match="ResNet has no features"):
        Symmetrized(make("torchvision")).features(images())


# Training.


@pytest.mark.parametrize("trained", ["none", "aggregator", "head", "all"])
@pytest.mark.parametrize("kind", ["octic", "timm", "torchvision"])
def test_nothing_changes_in_frozen_parts(kind, trained):
    """One step in training mode: no gradient, no moved statistics, no dropout in frozen parts."""
    net = Symmetrized(make(kind), "C4", "learned_score", trained=trained).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    parameters = [p for p in net.parameters() if p.requires_grad]
    assert bool(parameters) == (trained != "none")
    logits = net(images())
    if trained != "none":
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        logits.square().mean().backward()
        optimizer.step()
    head = {f"model.{name}" for name in ("head.weight", "head.bias", "fc.weight", "fc.bias")}
    for name, tensor in net.state_dict().items():
        free = trained == "all" or (trained != "none" and name.startswith("aggregator."))
        free = free or (trained == "head" and name in head)
        if not free:
            assert torch.equal(tensor, before[name]), name
    if trained != "none":
        moved = [n for n, t in net.state_dict().items() if not torch.equal(t, before[n])]
        assert any(name.startswith("aggregator.") for name in moved)
        assert (trained in ("head", "all")) == bool(head & set(moved))


def test_frozen_parts_stay_in_evaluation_mode():
    net = Symmetrized(make("timm"), trained="head")
    assert net.train() is net and net.eval() is net
    net.train()
    assert not net.model.blocks.training and net.model.head.training


def test_training_can_be_widened_again_and_what_the_caller_froze_stays():
    backbone = make("timm")
    backbone.patch_embed.requires_grad_(False)
    net = Symmetrized(backbone, trained="none").train()
    assert not any(p.requires_grad for p in net.parameters())
    net.set_trained("all")
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    assert frozen == ["model.patch_embed.proj.weight", "model.patch_embed.proj.bias"]
    assert net.model.blocks.training


def test_one_random_copy_trains_and_all_copies_judge():
    net, x = Symmetrized(make("timm"), one_copy=True).train(), images(64)
    with torch.no_grad():
        drawn = net(x)
        copies = net.split.head(net.model, net.embeddings(x).flatten(0, 1)).unflatten(0, (64, 8))
    gaps = (copies - drawn[:, None]).abs().amax(dim=-1)
    assert gaps.min(dim=1).values.max() < 1e-5
    assert len(gaps.argmin(dim=1).unique()) == 8
    assert error_of(net.eval(), x[:3]) < 1e-5


def test_gradients_reach_the_image_and_a_copy_of_the_net_is_its_own():
    net, x = Symmetrized(make("torchvision adapter"), "C8").eval(), images().requires_grad_()
    net(x).sum().backward()
    assert x.grad.abs().sum() > 0
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.model.parameters():
            parameter.zero_()
        assert twin(x).abs().sum() > 0 and net(x).abs().sum() == 0


# Files, configs, mistakes.


@pytest.mark.parametrize("aggregator", LEARNED)
def test_files_load_under_our_names_and_the_published_ones(aggregator, tmp_path):
    net = Symmetrized(make("small"), "D4", aggregator).eval()
    for name, rename in {
        "ours": lambda n: n,
        "theirs": lambda n: published_posthoc_name(n, aggregator),
    }.items():
        path = tmp_path / f"{name}.safetensors"
        save_file({rename(key): tensor for key, tensor in net.state_dict().items()}, path)
        torch.manual_seed(9)
        fresh = Symmetrized(KINDS["small"](), "D4", aggregator).eval()
        load_weights(fresh, path)
        assert torch.equal(fresh(images()), net(images()))
    state = {published_posthoc_name(k, aggregator): v for k, v in net.state_dict().items()}
    state.pop("model.cls_token")
    with pytest.raises(ValueError, match=r"missing: model\.cls_token; left over: model\.extra"):
        load_state(fresh, state | {"model.extra": torch.zeros(1)})


@pytest.mark.parametrize("kind", ["octic", "timm adapter", "small"])
def test_weights_of_the_backbone_alone_fit_unless_the_aggregator_learns(kind):
    backbone = make(kind)
    state = getattr(backbone, "net", backbone).state_dict()
    torch.manual_seed(9)
    net = Symmetrized(KINDS[kind]()).eval()
    load_state(net, state)
    with torch.no_grad():
        assert torch.equal(net(images()), Symmetrized(backbone).eval()(images()))
    with pytest.raises(ValueError, match="its aggregator learns"):
        load_state(Symmetrized(KINDS[kind](), aggregator="learned_score"), state)
    with pytest.raises(ValueError, match="left over: extra"):
        load_state(net, {**state, "extra": torch.zeros(1)})


def test_a_file_in_the_backbones_own_published_spelling_loads():
    """Names that only the wrapped net knows are read by it."""
    small = {"img_size": 12, "num_channels": 8, "num_heads": 2, "block_sizes": (1, 1), "window": 3}
    turning = GEViT(group="p4", **small)
    last = f"transformer.{len(turning.transformer)}.weight"
    plain = PlainResMlp(img_size=16, patch_size=4, embed_dim=16, depth=1, num_classes=5)
    cases = [
        (turning, GEViT(group="p4", **small), {"head.weight": last}),
        (
            plain,
            PlainResMlp(img_size=16, patch_size=4, embed_dim=16, depth=1, num_classes=5),
            {"stem.proj.weight": "patch_embed.proj.weight", "blocks.0.ls1": "blocks.0.gamma_1"},
        ),
    ]
    for backbone, fresh, theirs in cases:
        state = {theirs.get(name, name): tensor for name, tensor in backbone.state_dict().items()}
        net = Symmetrized(fresh, "C4")
        load_state(net, state)
        for name, tensor in backbone.state_dict().items():
            assert torch.equal(net.state_dict()[f"model.{name}"], tensor)


def test_a_config_node_hands_on_what_is_the_backbones():
    node = {
        "_target_": "baselines.posthoc.symmetrized.symmetrized",
        "group": "C4",
        "backbone": {"_target_": "vit.models.deit_small_patch16_LS", "_partial_": True},
    }
    net = build(node, num_classes=CLASSES, drop_path_rate=0.1, **SMALL)
    assert net.num_classes == CLASSES and net.img_size == (32, 32) and net.embed_dim == 32
    assert len(net.group) == 4
    with pytest.raises(UserError, match="takes no 'num_clases'"):
        build(node, num_clases=3)
    with pytest.raises(ValueError, match="the backbone is built already"):
        symmetrized(make("timm"), num_classes=3)


class Gated(Aggregator):
    """One of the user's, with weights."""

    def __init__(self, *, dim: int):
        super().__init__()
        self.score = nn.Linear(dim, 1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return (self.score(z).sigmoid() * z).mean(dim=1)


def test_an_aggregator_of_the_users_is_invariant_and_each_nets_own():
    gated, x = Gated(dim=32), images()
    first, second = (Symmetrized(make("timm"), aggregator=gated).eval() for _ in range(2))
    assert error_of(first, x) < 1e-5 and first.aggregator.learned
    assert first.aggregator.score.weight is not second.aggregator.score.weight


def test_a_fresh_head_is_taken_up():
    net = Symmetrized(make("timm"), trained="head")
    net.reset_classifier(7)
    assert net(images()).shape == (3, 7) and net.num_classes == 7
    assert [n for n, p in net.named_parameters() if p.requires_grad] == [
        "model.head.weight",
        "model.head.bias",
    ]


def test_a_fresh_head_trains_where_the_backbone_was_frozen():
    """With the head that it had."""
    net = Symmetrized(make("timm").requires_grad_(False), trained="none")
    net.reset_classifier(7)
    net.set_trained("all")
    trained = {name for name, p in net.model.named_parameters() if p.requires_grad}
    assert trained == {"head.weight", "head.bias"}


@pytest.mark.parametrize("group", ["D4", "C8"])
@pytest.mark.parametrize("options", [{}, {"chunk": 3}, {"aggregator": "mean_logits"}])
def test_no_images_give_no_logits(group, options):
    net = Symmetrized(make("octic"), group, **options).eval()
    assert net(images()[:0]).shape == (0, CLASSES)
    assert net.features(images()[:0])[0].patches.shape == (0, 4, 4, 32)
    drawn = Symmetrized(make("timm"), group, one_copy=True).train()
    assert drawn(images()[:0]).shape == (0, CLASSES)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"output": "features"}, "output must be one of logits, embedding, map"),
        ({"trained": "tail"}, "trained must be one of none, aggregator, head, all"),
        ({"trained": "aggregator"}, "aggregator mean has nothing to train"),
        ({"chunk": -1}, "chunk must be a whole number from 0, not -1"),
        ({"chunk": 1.5}, "chunk must be a whole number from 0, not 1.5"),
        ({"fill": "black", "group": "C8"}, "fill must be a number, or a list with one per channel"),
        ({"group": "D"}, "unknown group 'D'"),
    ],
)
def test_mistakes_are_one_line(options, said):
    with pytest.raises(ValueError, match=said):
        Symmetrized(make("timm"), **options)


def test_a_net_without_a_seam_says_so():
    with pytest.raises(ValueError, match=r"give \(embed, head\)"):
        Symmetrized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))


def test_two_heads_of_one_embedding_are_averaged():
    """As timm's distilled LeViT gives them, whose heads have no tokens of their own."""
    net = timm.create_model("test_resnet", num_classes=CLASSES).eval()
    head, width = net.get_classifier(), net.num_features
    other = nn.Linear(width, CLASSES)
    net.get_classifier = lambda: (head, other)
    split, z = find_split(net), torch.randn(2, width)
    torch.testing.assert_close(split.head(net, z), (head(z) + other(z)) / 2)
    assert split.parts(net) == [head, other]


@pytest.mark.parametrize("name", ["gevit_rotmnist_z2", "gevit_digits_p4m"])
def test_a_ge_vit_is_cut_before_its_largest_logit(name):
    """Its head is a convolution on the group: the embedding is the map summed over pixels."""
    net = getattr(gevit, name)(num_classes=5, in_chans=1).double().eval()
    images = torch.randn(2, 1, 28, 28).double()
    wrapped = Symmetrized(net, aggregator="mean").eval()
    split = wrapped.split
    torch.testing.assert_close(split.head(net, split.embed(net, images)), net(images))
    turned = wrapped(images.rot90(1, (-2, -1)))
    torch.testing.assert_close(turned, wrapped(images))
    assert wrapped.num_classes == 5
