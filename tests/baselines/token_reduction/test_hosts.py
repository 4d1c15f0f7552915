"""What a network does beside its blocks, a reduced one does too: masks, crops, sizes, dropout."""

import pytest
import torch

from baselines.token_reduction.presets import make_reducer
from baselines.token_reduction.reduced import Reduced
from baselines.token_reduction.reducer import Facts, State
from tests.baselines.token_reduction.toys import METHODS, Opened, images, net_of, reduced, reducer
from utils.symmetry import transform_image


def test_hidden_patches_and_crops_are_encoded_as_by_the_network():
    """What DINOv2 trains with: masks, crops of two sizes, tokens before the norm and after it."""
    net, x = net_of("dinov2"), images()
    wrapped = Reduced(net, Opened()).eval()
    masks = torch.rand(3, 64) < 0.4
    assert not torch.equal(net(x, masks), net(x))
    assert torch.equal(wrapped(x, masks), net(x, masks))
    assert torch.equal(wrapped.forward_features(x, masks), net.forward_features(x, masks))
    crops = [x, images(2, 16)]
    for ours, theirs in zip(
        wrapped.encode(crops, [masks, None]), net.encode(crops, [masks, None]), strict=True
    ):
        for part, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("method", METHODS)
def test_what_encode_and_features_give_is_one(method):
    """Of several blocks at once as of each by itself, and of crops as of images."""
    wrapped, x = reduced("dinov2", method), images()
    together = wrapped.features(x, (4, 2, -1))
    for layer, found in zip((4, 2, -1), together, strict=True):
        (alone,) = wrapped.features(x, (layer,))
        assert torch.equal(found.cls, alone.cls) and torch.equal(found.patches, alone.patches)
    (encoded,) = wrapped.encode([x])
    assert torch.equal(encoded.cls, together[-1].cls)
    assert torch.equal(encoded.patches, together[-1].patches.flatten(1, 2))
    assert torch.equal(wrapped.net.norm(encoded.prenorm)[:, 4:], encoded.patches)


@pytest.mark.parametrize("host", ["timm adapter", "ours", "dinov2", "hybrid"])
def test_oblong_images_keep_rows_and_columns(host):
    net, x = net_of(host), images(size=40)[..., :24]
    wrapped = Reduced(net, Opened()).eval()
    (ours,), (theirs,) = wrapped.features(x), net.features(x)
    assert torch.equal(ours.patches, theirs.patches)
    assert wrapped.inspect(x).origin.shape == theirs.patches.shape[:3] == (3, 10, 6)


@pytest.mark.parametrize("method", ["hourglass", "evit", "evo_vit", "ats", "act", "smyrf"])
def test_oblong_images_are_reduced_where_they_are(method):
    """A net of symmetric filters, without positions, commutes with mirroring; so does a method."""
    net = net_of("ours")
    filters = net.patch_embed.proj.weight.data
    filters.add_(filters.flip(-1))
    torch.nn.init.zeros_(net.pos_embed)
    options = {"num_clusters": (6, 4)} if method == "hourglass" else {}
    wrapped = Reduced(net, reducer(method, **options)).double().eval()
    x = images(size=48)[..., :32].double()
    maps = wrapped.features(x)[0].patches.movedim(-1, 1)
    found = wrapped.features(transform_image(x, "m"))[0].patches.movedim(-1, 1)
    torch.testing.assert_close(found, transform_image(maps, "m"), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("host", "rates"),
    [
        ("timm", {"attn_drop_rate": 0.3}),
        ("timm", {"proj_drop_rate": 0.3}),
        ("timm", {"drop_rate": 0.3}),
        ("ours", {"attn_drop_rate": 0.3}),
        ("hybrid", {"attn_drop_rate": 0.3, "drop_rate": 0.3}),
    ],
)
def test_an_opened_block_drops_out_what_the_block_drops_out(host, rates):
    """In training; and nothing in evaluation."""
    net, x = net_of(host, **rates).train(), images(8)
    wrapped = Reduced(net, Opened()).train()
    results = []
    for model in (net, wrapped):
        torch.manual_seed(3)
        results.append(model(x))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(results[0], net.eval()(x), atol=1e-3)
    assert torch.equal(wrapped.eval()(x), net(x))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("evit", {"locations": [1]}),
        ("evit", {"locations": [1], "score": "all"}),
        ("tome", {"r": 4}),
        ("evo_vit", {"location": 1}),
        ("ats", {"locations": [1]}),
    ],
)
def test_dropout_of_weights_is_true_on_average(method, options):
    """Also where a method computes its own attention: other draws differ, their mean does not."""
    made, state = make_reducer(method, **options), State(1, (2, 3), attn_drop=0.5)
    made.bind(Facts(depth=2, first=0, num_prefix=1, has_class_token=True, head_dim=4))
    q, k, v, normed = torch.randn(4, 1, 2, 7, 4).expand(-1, 4000, -1, -1, -1)
    drawn = made.attend(state, 1, q, k, v, normed[:, 0]).out
    exact = made.attend(State(1, (2, 3)), 1, q[:1], k[:1], v[:1], normed[:1, 0]).out
    assert (drawn[0] - drawn[1]).abs().max() > 0.1
    torch.testing.assert_close(drawn.mean(dim=0, keepdim=True), exact, rtol=0, atol=0.1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", ["ours", "hybrid"])
def test_the_blocks_that_may_be_compiled_alone_are_those_that_are_called(host, method):
    """Of the others only parts run, so that sharding or compiling them would come to nothing."""
    wrapped, called = reduced(host, method), []
    for block in wrapped.net.blocks:
        block.register_forward_hook(lambda block, *_: called.append(block))
    wrapped(images())
    assert called == wrapped.blocks


def test_names_without_decay_are_those_of_parameters():
    wrapped = reduced("dinov2", "tome")
    spared = wrapped.no_weight_decay()
    assert spared and spared <= {name for name, _ in wrapped.named_parameters()}


def test_a_share_of_samples_counts_the_patches_of_the_grid():
    """One sample keeps one patch at most; more samples than patches are as many as patches."""
    x = images()
    for one, other in ((0.25, 16), (1.0, None), (1000, 64), (0.001, 1)):
        found = [reduced("ours", "ats", num_samples=number)(x) for number in (one, other)]
        assert torch.equal(*found)
    single = reduced("ours", "ats", num_samples=1).inspect(x)
    assert single.tokens.shape[1] == 2 and (single.origin >= 0).sum() == len(x)


@pytest.mark.parametrize("host", ["timm", "timm distilled", "timm adapter", "ours", "hybrid"])
def test_a_reduced_net_is_described_as_the_network_in_it(host):
    """As probes, transforms and fine-tuning read it: sizes, and layers by their names from here."""
    wrapped = reduced(host, "tome")
    assert (wrapped.patch_size, wrapped.embed_dim, wrapped.depth) == (4, 32, 6)
    assert wrapped.num_classes == 5 and wrapped.switch == (2 if host == "hybrid" else 0)
    heads = wrapped.pretrained_cfg["classifier"]
    heads = [heads] if isinstance(heads, str) else heads
    assert len(heads) == 1 + (host == "timm distilled")
    for name in heads:
        assert wrapped.get_submodule(name).out_features == 5


def test_one_method_serves_networks_of_any_depth():
    """Each has its own, so that the blocks of one are not those of another; also after a switch."""
    shared = make_reducer("evit", keep_rate=0.5)
    first, x = Reduced(net_of("ours"), shared).eval(), images()
    before = first(x)
    second = Reduced(net_of("hybrid"), shared).eval()
    assert set(second.reducer.rates) != set(first.reducer.rates)
    assert torch.equal(first(x), before)
    second.set_reducer(reducer("ats"))
    assert torch.equal(second(x), reduced("hybrid", "ats")(x))


@pytest.mark.parametrize("method", ["act", "smyrf"])
def test_projections_fit_the_network_that_a_method_goes_on_to(method):
    """Of other heads too: as a method made for that network."""
    first = reduced("ours", method)
    net, x = net_of("ours", num_heads=2).eval(), images()
    moved, made = Reduced(net, first.reducer).eval(), Reduced(net, reducer(method)).eval()
    assert torch.equal(moved(x), made(x))


@pytest.mark.parametrize("mode", ["sample", "subset"])
def test_an_opened_block_drops_branches_as_the_block_does(mode):
    """Same sequences, same kept share; updates in half precision do not round it."""
    net, x = net_of("ours", drop_path_rate=0.3, drop_path_mode=mode).train(), images(8)
    results = []
    for model in (net, Reduced(net, Opened()).train()):
        torch.manual_seed(3)
        results.append(model(x))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    host, block = Reduced(net, Opened()).host, net.blocks[-1]
    block.drop_path_rate = 0.1
    update = torch.ones(64, 1, 1, dtype=torch.bfloat16)
    shares = host.keep(block, 1, update, torch.float32).unique()
    kept = 0.9 if mode == "sample" else 57 / 64
    torch.testing.assert_close(shares, torch.tensor([0.0, 1 / kept]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("residual", ["raw", "normed"])
def test_a_sampling_block_adds_to_the_residual_that_was_chosen(residual):
    """Where branches add nothing, a kept token is that residual, and a dropped one as it came."""
    net, x = net_of("ours"), images()
    for block in net.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    wrapped = Reduced(
        net, make_reducer("ats", locations=2, num_samples=9, residual=residual)
    ).eval()
    came = net.embed(x)
    stays = net.blocks[2].norm1(came) if residual == "normed" else came
    kept = (wrapped.inspect(x).origin >= 0).flatten(1)
    expected = torch.where(kept[..., None], net.norm(stays)[:, 1:], net.norm(came)[:, 1:])
    (found,) = wrapped.features(x)
    torch.testing.assert_close(found.patches.flatten(1, 2), expected)
    torch.testing.assert_close(found.cls, net.norm(stays)[:, 0])


def test_every_block_weighs_its_own_attention_in_the_running_one():
    """Evo-ViT: a tradeoff of 1 takes the block's own alone, one of 0 leaves what was."""
    shares = [1.0, 0.0, 1.0, 0.0, 0.25, 1.0]
    one, all_own = (
        reduced("ours", "evo_vit", keep_rate=1.0, tradeoff=tradeoff).inspect(images()).record
        for tradeoff in (shares, 1.0)
    )
    running = [one[f"block{index}.class_attention"] for index in range(6)]
    own = [all_own[f"block{index}.class_attention"] for index in range(6)]
    assert torch.equal(running[1], running[0]) and torch.equal(running[3], running[2])
    assert torch.equal(running[2], own[2]) and torch.equal(running[5], own[5])
    torch.testing.assert_close(running[4], 0.75 * own[2] + 0.25 * own[4])


def test_a_mean_weighs_tokens_by_their_patches_and_leaves_out_padding():
    """Also of a method of the user's that merges and pads."""
    size, live = torch.rand(3, 65, 1) + 0.5, torch.rand(3, 65) < 0.7

    class Both(Opened):
        def after_block(self, state, index, x):
            state.size, state.live = size, live
            return x

    net, x = net_of("pooled"), images()
    tokens = net.forward_features(x)[:, 1:]
    shares = (size * live[..., None])[:, 1:]
    mean = (tokens * shares).sum(dim=1) / shares.sum(dim=1)
    torch.testing.assert_close(Reduced(net, Both()).eval()(x), net.head(mean))
