"""Every method in every host: nothing where nothing is asked, full resolution, one contract."""

import copy

import pytest
import timm
import torch

import octic.models
from baselines.token_reduction.presets import make_reducer
from baselines.token_reduction.reduced import Reduced
from baselines.token_reduction.reduced import reduced as build_reduced
from baselines.token_reduction.reducer import Reducer
from tests.baselines.token_reduction.toys import (
    CLASSES,
    DEPTH,
    HOSTS,
    METHODS,
    SIDE,
    SMALL,
    Opened,
    images,
    net_of,
    reduced,
    reducer,
    timm_net,
)
from utils.config.build import build
from utils.symmetry import SYMMETRIES, transform_image
from vit.backbone import Backbone
from vit.vision_transformer import VisionTransformer
from vit.weights import load_state

# What leaves a network as it is.
NEUTRAL = {
    "hourglass": {"location": DEPTH},
    "evit": {"keep_rate": 1.0},
    "tome": {"r": 0},
    "evo_vit": {"keep_rate": 1.0},
    "ats": {"locations": []},
    "act": {"start": DEPTH},
    "smyrf": {"start": DEPTH},
}


# For a net of 4 blocks, of which 2 are plain.
EARLY = {"hourglass": {"location": 2}, "evit": {"locations": [2]}, "ats": {"locations": [2]}}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_small_patch16_LS"])
def test_a_wrapped_net_tells_the_channels_of_its_images(name):
    for channels in (1, 5):
        net = timm.create_model(name, in_chans=channels)
        assert Reduced(net, Opened()).in_chans == channels


@pytest.mark.parametrize("host", HOSTS)
def test_an_opened_block_computes_what_the_block_does(host):
    """Bit for bit: q/k norm, layer scale, registers, norms inside; logits and features."""
    net, x = net_of(host), images()
    wrapped = Reduced(net, Opened()).eval()
    assert torch.equal(wrapped(x), net(x))
    if hasattr(net, "features"):
        for ours, theirs in zip(
            wrapped.features(x, (1, -1)), net.features(x, (1, -1)), strict=True
        ):
            assert torch.equal(ours.cls, theirs.cls) and torch.equal(ours.patches, theirs.patches)


@pytest.mark.parametrize("mode", ["sample", "subset"])
@pytest.mark.parametrize("host", ["timm", "ours", "hybrid"])
def test_an_opened_block_drops_the_paths_that_the_block_drops(host, mode):
    if host == "timm" and mode == "subset":
        pytest.skip("timm drops single samples")
    options = {} if host == "timm" else {"drop_path_mode": mode}
    net, x = net_of(host, drop_path_rate=0.5, **options).train(), images(8)
    wrapped = Reduced(net, Opened()).train()
    torch.manual_seed(3)
    expected = net(x)
    torch.manual_seed(3)
    torch.testing.assert_close(wrapped(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", NEUTRAL)
@pytest.mark.parametrize("host", ["timm", "ours", "dinov2", "hybrid"])
def test_no_reduction_is_the_network(host, method):
    net, x = net_of(host), images()
    wrapped = Reduced(net, make_reducer(method, **NEUTRAL[method])).eval()
    assert torch.equal(wrapped(x), net(x))
    assert torch.equal(wrapped.forward_features(x), net.forward_features(x))
    found = wrapped.inspect(x)
    own = torch.arange(SIDE * SIDE).reshape(SIDE, SIDE) + wrapped.num_prefix_tokens
    assert torch.equal(found.origin, own.expand(3, -1, -1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", HOSTS)
def test_every_method_in_every_host(host, method):
    """Logits as ever, maps at full resolution for every block, and less work in between."""
    net, x = net_of(host), images()
    wrapped = reduced(host, method)
    assert isinstance(wrapped, Backbone)
    logits = wrapped(x)
    assert logits.shape == net(x).shape and logits.isfinite().all()
    assert not torch.equal(logits, net(x))
    found = wrapped.features(x, range(DEPTH))
    assert all(part.patches.shape == (3, SIDE, SIDE, 32) for part in found)
    assert all(part.cls.shape == (3, 32) and part.patches.isfinite().all() for part in found)
    assert wrapped.forward_features(x).shape == net_tokens(wrapped, x)
    assert torch.equal(wrapped.get_classifier().weight, net_head(net)) if host == "ours" else True
    laid_open = wrapped.inspect(x)
    torch.testing.assert_close(laid_open.logits, logits)
    assert laid_open.origin.shape == (3, SIDE, SIDE)
    shorter = method in ("hourglass", "evit", "tome", "ats")
    assert (laid_open.tokens.shape[1] < SIDE * SIDE) == shorter
    assert laid_open.origin.max() < laid_open.tokens.shape[1]


def net_tokens(wrapped, x):
    return len(x), wrapped.num_prefix_tokens + SIDE * SIDE, 32


def net_head(net):
    return net.head.weight


def test_hosts_agree_on_the_same_weights():
    """One set of weights as timm's network and as ours: the same tokens, the same decisions."""
    timm_vit = net_of("timm", init_values=0.5)
    twin = VisionTransformer(
        img_size=32,
        patch_size=4,
        embed_dim=32,
        depth=DEPTH,
        num_heads=4,
        num_classes=CLASSES,
        init_values=0.5,
        class_position=True,
    )
    twin.load_state_dict(timm_vit.state_dict())
    for method in METHODS:
        parts = [Reduced(net, reducer(method)).eval().inspect(images()) for net in (timm_vit, twin)]
        torch.testing.assert_close(parts[0].logits, parts[1].logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(parts[0].origin, parts[1].origin), method


@pytest.mark.parametrize("method", ["evit", "ats", "tome", "evo_vit"])
def test_what_stays_is_restored_where_it_was(method):
    """A patch that still has a token reads it; one that was dropped has a value of its own."""
    wrapped = reduced("dinov2", method)
    x = images()
    found, whole = wrapped.inspect(x), wrapped.features(x)[0].patches
    carried = found.origin >= 0
    assert bool(carried.all()) == (method in ("tome", "evo_vit"))
    rows = torch.arange(len(x))[:, None, None]
    read = found.tokens[rows, found.origin.clamp(min=0)]
    torch.testing.assert_close(whole[carried], read[carried])
    assert whole[~carried].isfinite().all() and (whole[~carried].norm(dim=-1) > 0).all()


@pytest.mark.parametrize("host", ["ours", "pooled"])
@pytest.mark.parametrize("method", METHODS)
def test_an_image_does_not_depend_on_its_batch(method, host):
    """Padding and clusters of other images are not seen, nor meant (sound form)."""
    wrapped, x = reduced(host, method).double(), images(4).double()
    together = wrapped.features(x)[0]
    for index in range(len(x)):
        alone = wrapped.features(x[index : index + 1])[0]
        torch.testing.assert_close(together.cls[index], alone.cls[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(together.patches[index], alone.patches[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(wrapped(x)[:1], wrapped(x[:1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["ats", "smyrf"])
def test_the_published_forms_do_depend_on_it(method):
    """So that it is known: what the tables were measured with reads the rest of the batch."""
    options = {"query_cluster_size": 16, "seed": 0} if method == "smyrf" else {}
    wrapped, x = reduced("ours", method, form="published", **options), images(4)
    assert (wrapped(x)[:1] - wrapped(x[:1])).abs().max() > 1e-4


def test_octic_blocks_stay_and_earlier_positions_are_refused():
    net = net_of("hybrid")
    for method, options in {
        "hourglass": {"location": 1},
        "evit": {"locations": [1]},
        "ats": {"locations": [0]},
        "act": {"start": 0},
        "smyrf": {"start": 1},
    }.items():
        with pytest.raises(ValueError, match="octic and stay as they are; the plain ones are 2 to"):
            Reduced(net, make_reducer(method, **options))
    with pytest.raises(ValueError, match="octic"):
        Reduced(net, make_reducer("tome", r=[1] * DEPTH))
    with pytest.raises(ValueError, match="location 3 is the first possible"):
        Reduced(net, make_reducer("evo_vit", location=2))
    with pytest.raises(ValueError, match="all 6 blocks of .* are octic"):
        Reduced(net_of("hybrid", octic_equi_break_layer=DEPTH), make_reducer("tome"))
    defaults = Reduced(net, make_reducer("tome", r=4)).reducer
    assert defaults.schedule == [0, 0, 4, 4, 4, 4]
    maps = Reduced(net, make_reducer("tome", r=9)).eval().features(images(), (0, 1))
    for ours, theirs in zip(maps, net.features(images(), (0, 1)), strict=True):
        assert torch.equal(ours.patches, theirs.patches)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "tome"])
def test_an_invariant_net_stays_invariant(method):
    """Behind the invariantization a turned image permutes tokens, with which a method commutes."""
    torch.manual_seed(0)
    net = octic.models.d8_inv_early_deit_small_patch16(
        **SMALL, depth=4, num_classes=CLASSES, init_values=1.0
    )
    wrapped = Reduced(net, reducer(method, **EARLY.get(method, {}))).double().eval()
    x = images().double()
    maps = wrapped.features(x)[0].patches.movedim(-1, 1)
    for name in SYMMETRIES:
        turned = transform_image(x, name)
        torch.testing.assert_close(wrapped(turned), wrapped(x), rtol=1e-8, atol=1e-8)
        found = wrapped.features(turned)[0].patches.movedim(-1, 1)
        torch.testing.assert_close(found, transform_image(maps, name), rtol=1e-8, atol=1e-8)


def test_no_parameters_are_added_and_files_load_strictly():
    net, x = net_of("ours"), images()
    wrapped = Reduced(copy.deepcopy(net), reducer("act"))
    assert {f"net.{name}" for name in net.state_dict()} == set(wrapped.state_dict())
    other = Reduced(net_of("ours"), reducer("tome")).eval()
    state = {name: torch.randn_like(t) * 0.1 for name, t in net.state_dict().items()}
    load_state(other, state)
    assert torch.equal(other.net.head.weight, state["head.weight"])
    load_state(other, wrapped.state_dict())
    assert torch.equal(other.net(x), net(x))
    with pytest.raises(ValueError, match="missing: head.bias"):
        load_state(other, {name: t for name, t in state.items() if name != "head.bias"})


def test_a_copy_is_a_network_of_its_own():
    wrapped = reduced("ours", "evit")
    twin = copy.deepcopy(wrapped)
    assert twin.host.net is twin.net and twin.net is not wrapped.net
    torch.nn.init.zeros_(twin.net.head.weight)
    assert not torch.equal(twin(images()), wrapped(images()))


def test_kept_patches_shrink_stage_by_stage():
    stages = reduced("ours", "evit", fuse_token=False).kept_patches(images())
    assert [int(stage.sum()) for stage in stages] == [3 * 39, 3 * 24]
    assert bool((stages[0] | ~stages[1]).all())
    assert reduced("ours", "tome").kept_patches(images()) == []


def test_encode_gives_all_patches_of_crops_of_any_size():
    wrapped = reduced("dinov2", "evit")
    crops = [images(), images(2, 16)]
    masks = [torch.rand(3, 64) < 0.3, None]
    large, small = wrapped.encode(crops, masks)
    assert large.patches.shape == (3, 64, 32) and small.patches.shape == (2, 16, 32)
    assert large.registers.shape == (3, 3, 32) and small.prenorm.shape == (2, 20, 32)


def test_config_node_builds_and_hands_keywords_on():
    node = {
        "_target_": "baselines.token_reduction.reduced.reduced",
        "_partial_": True,
        "backbone": {"_target_": "vit.models.deit_small_patch16_LS", "_partial_": True},
        "method": "evit",
        "options": {"keep_rate": 0.5},
    }
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4}
    net = build(node)(num_classes=7, **sizes)
    assert net.num_classes == 7 and net.reducer.rates == {1: 0.5, 2: 0.5, 3: 0.5}
    assert net(images()).shape == (3, 7)
    net.reset_classifier(3)
    assert net(images()).shape == (3, 3)
    with pytest.raises(ValueError, match="built already"):
        build_reduced(timm_net(), num_classes=7)


@pytest.mark.parametrize("method", METHODS)
def test_no_images_give_no_logits(method):
    wrapped = reduced("ours", method)
    assert wrapped(images()[:0]).shape == (0, CLASSES)
    assert wrapped.features(images()[:0])[0].patches.shape == (0, SIDE, SIDE, 32)


def test_what_cannot_be_reduced_is_one_line():
    cases = {
        "cannot be reduced: hosts are": lambda: Reduced(torch.nn.Linear(2, 2), reducer("tome")),
        "reads a fixed set of tokens": lambda: Reduced(
            timm_net(global_pool="map"), reducer("tome")
        ),
        "breaks the grid": lambda: Reduced(timm_net(patch_drop_rate=0.2), reducer("tome")),
        "DiffAttention cannot be opened": lambda: Reduced(
            timm_net(attn_layer="diff"), reducer("tome")
        ),
        "method must be one of .*not 'tomme'": lambda: make_reducer("tomme"),
        "form must be one of .*not 'new'": lambda: make_reducer("tome", form="new"),
        "evit takes no rate": lambda: make_reducer("evit", rate=0.5),
        "the network has blocks 0 to 5": lambda: Reduced(
            timm_net(), make_reducer("evit", locations=[6])
        ),
        "the network has no class token": lambda: Reduced(
            timm_net(class_token=False, global_pool="avg"), make_reducer("evit")
        ),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            call()


@pytest.mark.parametrize("method", ["hourglass", "tome", "act", "smyrf"])
def test_a_network_without_class_token_is_reduced_too(method):
    net = timm_net(class_token=False, global_pool="avg")
    wrapped = Reduced(net, reducer(method)).eval()
    assert wrapped(images()).shape == (3, CLASSES)
    assert wrapped.features(images())[0].patches.shape == (3, SIDE, SIDE, 32)


def test_registers_do_not_stand_for_a_class_token():
    """It is the mean of the patches, as the net itself gives it."""
    options = {"class_token": False, "global_pool": "avg", "num_register_tokens": 2}
    net = VisionTransformer(**SMALL, depth=DEPTH, num_classes=CLASSES, **options).eval()
    (features,) = Reduced(net, make_reducer("tome", r=0)).eval().features(images())
    torch.testing.assert_close(features.cls, features.patches.mean(dim=(1, 2)))
    torch.testing.assert_close(features.cls, net.features(images())[0].cls)


def test_merged_tokens_count_in_the_mean():
    """Two copies of one patch are merged without a trace in the pooled feature."""
    net = net_of("pooled")
    wrapped = Reduced(net, make_reducer("tome", r=[0] * 5 + [20])).eval()
    pooled = wrapped.forward_head(wrapped.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(net.head(pooled), wrapped(images()), rtol=1e-4, atol=1e-5)


def test_published_merging_takes_the_mean_of_what_is_left():
    net = net_of("pooled")
    wrapped = Reduced(net, make_reducer("tome", form="published", r=[0] * 5 + [20])).eval()
    left = wrapped.inspect(images()).tokens
    torch.testing.assert_close(wrapped(images()), net.forward_head(left), rtol=1e-4, atol=1e-5)


def test_a_method_of_the_users_is_taken_by_a_config_node():
    node = {"_target_": "vit.models.deit_small_patch16_LS", "_partial_": True}
    net = build_reduced(build(node), method=Reducer(), img_size=32, patch_size=8, depth=1)
    assert type(net.reducer) is Reducer


def test_a_method_that_drops_patches_and_does_not_say_which_is_named():
    class Half(Reducer):
        def before_block(self, state, index, x):
            return x[:, : x.shape[1] // 2] if index == DEPTH - 1 else x

    net, x = Reduced(net_of("hybrid"), Half()), images()
    assert net(x).shape == (len(x), CLASSES)
    with pytest.raises(ValueError, match="Half leaves .* state.move"):
        net.features(x)
