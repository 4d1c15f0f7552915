"""Ways through a net: the short one of training, and timm's maps of stages and blocks."""

from itertools import combinations

import pytest
import timm
import torch

from baselines.flopping.activation import ACTIVATIONS
from baselines.flopping.convnext import MirrorConvNeXt
from baselines.flopping.plain import PlainConvNeXt, PlainResMlp
from baselines.flopping.resmlp import MirrorResMlp
from tests.baselines.flopping.cases import (
    CONVNEXT,
    ISOTROPIC,
    RESMLP,
    convnext,
    images,
    isotropic,
    relative,
    resmlp,
    shaken,
)

TRAINED = {
    "resmlp": lambda: resmlp(drop_path_rate=0.5, drop_rate=0.3),
    "convnext": lambda: convnext(drop_path_rate=0.5, drop_rate=0.3),
    "isotropic": lambda: isotropic(drop_path_rate=0.5, drop_rate=0.3, init_values=None),
}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("recompute", (False, True))
def test_the_shortened_last_block_trains_as_the_whole_one(name: str, recompute: bool) -> None:
    """Of the same draws, stochastic depth and dropout act alike on the short way and the whole."""
    net = TRAINED[name]().train()
    net.set_grad_checkpointing(recompute)
    x = images(net).repeat(8, 1, 1, 1)
    torch.manual_seed(1)
    short = net(x)
    torch.manual_seed(1)
    whole = net.forward_head(net.forward_features(x))
    assert relative(short, whole) <= 1e-12
    assert relative(short, net.eval()(x)) > 1e-2


@pytest.mark.parametrize("make", (resmlp, isotropic))
def test_a_block_that_is_dropped_leaves_everything_as_it_was(make) -> None:
    """Stochastic depth spares none of its branches."""
    net = make(drop_path_rate=1 - 1e-9).train()
    before, after = net.features(images(net), (-2, -1))
    assert torch.equal(before.patches, after.patches)
    before, after = net.eval().features(images(net), (-2, -1))
    assert not torch.equal(before.patches, after.patches)


@pytest.mark.parametrize("make", (resmlp, isotropic, lambda: shaken(PlainConvNeXt(**ISOTROPIC))))
def test_normed_maps_of_one_stage_are_the_features_of_its_blocks(make) -> None:
    """timm's `norm`; without it the maps are raw, and the last one is that of the whole pass."""
    net = make()
    x = images(net)
    last, normed = net.forward_intermediates(x, norm=True)
    for found, features in zip(normed, net.features(x, range(net.depth)), strict=True):
        assert torch.equal(found.permute(0, 2, 3, 1), features.patches)
    assert torch.equal(last, net.forward_features(x))
    assert torch.equal(net.forward_intermediates(x, [0])[0], last)
    early, (first,) = net.forward_intermediates(x, [0], stop_early=True)
    assert not torch.equal(early, last)
    assert not torch.equal(first, normed[0])
    assert torch.equal(net.full_map(early).permute(0, 3, 1, 2), first)


@pytest.mark.parametrize("make", (convnext, lambda: shaken(PlainConvNeXt(**CONVNEXT))))
def test_of_several_stages_the_last_map_alone_is_normed(make) -> None:
    """The norm has the width of the last stage."""
    net = make()
    x = images(net)
    raw, normed = (net.forward_intermediates(x, norm=norm)[1] for norm in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(raw[:-1], normed, strict=False))
    assert torch.equal(normed[-1].permute(0, 2, 3, 1), net.features(x)[0].patches)
    assert not torch.equal(raw[-1], normed[-1])
    assert [part["reduction"] for part in net.feature_info] == [
        net.img_size[0] // found.shape[-2] for found in raw
    ]


@pytest.mark.parametrize("value", (0.125, 2))
def test_layer_scales_of_twins_start_alike(value: float) -> None:
    """At `init_values`, in every block; a whole number too, as a command line gives it."""
    for make, word in ((MirrorResMlp, ".ls"), (PlainResMlp, ".ls"), (MirrorConvNeXt, ".gamma")):
        options = CONVNEXT if make is MirrorConvNeXt else RESMLP
        net = make(**options, init_values=value)
        scales = [p for name, p in net.named_parameters() if word in name]
        assert scales and all((scale == value).all() for scale in scales)


@pytest.mark.parametrize("make", (MirrorConvNeXt, PlainConvNeXt))
def test_a_fresh_classifier_is_scaled(make) -> None:
    """And nothing else is."""
    nets = []
    for scale in (1.0, 0.25):
        torch.manual_seed(0)
        nets.append(make(**ISOTROPIC, head_init_scale=scale))
    for (name, plain), scaled in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(scaled, plain * (0.25 if name.startswith("head.") else 1)), name


@pytest.mark.parametrize("make", (resmlp, isotropic, convnext))
@pytest.mark.parametrize("coarse", (False, True))
def test_layers_have_the_depth_at_which_they_run(make, coarse: bool) -> None:
    """For layer-wise learning rates (timm): a stage's entry with its first block, the head last."""
    net = make()
    parts = ["stem"]
    if make is convnext:
        for index, stage in enumerate(net.stages):
            parts += [f"entries.{index}", *(f"stages.{index}.{b}" for b in range(len(stage)))]
    else:
        parts += [f"{'blocks' if make is resmlp else 'stages.0'}.{b}" for b in range(net.depth)]
    parts += ["norm", "head"]
    depths = timm.models.group_parameters(net, net.group_matcher(coarse), reverse=True)
    found = {p: {d for n, d in depths.items() if n.startswith(f"{p}.")} for p in parts}
    assert all(len(depth) == 1 for depth in found.values())
    order = [min(depth) for depth in found.values()]
    assert order == sorted(order) and order[0] == 0 < order[-1]
    blocks = [min(found[p]) for p in parts if p.startswith(("blocks", "stages"))]
    whole = coarse and make is convnext
    assert len(set(blocks)) == (len(net.stages) if whole else len(blocks))


@pytest.mark.parametrize("make", (resmlp, isotropic, convnext))
def test_pooling_is_switched_off_and_on_with_the_head(make) -> None:
    """timm's `global_pool`: "" gives the features of the last block."""
    net = make()
    x, plain = images(net), net.get_classifier()
    logits, features = net(x), net.forward_features(x)
    net.reset_classifier(0, "")
    assert torch.equal(net(x), features) and torch.equal(net.forward_head(features), features)
    net.reset_classifier(1, "avg")
    net.head = net.head.double()
    assert net(x).shape == (2, 1) and net.num_classes == 1
    net.head = plain
    assert torch.equal(net(x), logits)
    with pytest.raises(ValueError, match="unknown global_pool 'max'"):
        net.reset_classifier(3, "max")


def test_the_smallest_image_is_one_place() -> None:
    """And one class is a head too."""
    net = convnext(img_size=32, num_classes=1)
    assert net(images(net)).shape == (2, 1)
    assert net.features(images(net))[0].patches.shape == (2, 1, 1, net.embed_dim)


@pytest.mark.parametrize(
    ("make", "options", "shapes"),
    [
        (
            isotropic,
            {"kernel_size": 5, "mlp_ratio": 2.0, "depthwise": "symmetric"},
            {"stages.0.1.dwconv.sym_to_sym": (8, 1, 5, 3), "stages.0.1.pwconv1.lin_A1": (16, 8)},
        ),
        (
            lambda **options: shaken(PlainConvNeXt(**{**ISOTROPIC, **options})),
            {"kernel_size": 5, "mlp_ratio": 2.0},
            {"stages.0.1.conv_dw": (16, 1, 5, 5), "stages.0.1.mlp.fc1": (32, 16)},
        ),
        (resmlp, {"mlp_ratio": 2.0}, {"blocks.1.mlp.fc1.lin_A1": (16, 8)}),
        (
            lambda **options: shaken(PlainResMlp(**{**RESMLP, **options})),
            {"mlp_ratio": 2.0},
            {"blocks.1.mlp_channels.fc1": (32, 16)},
        ),
    ],
)
def test_sizes_reach_every_block(make, options: dict, shapes: dict) -> None:
    """Of kernels and hidden layers."""
    state = make(**options).state_dict()
    assert {name: tuple(state[f"{name}.weight"].shape) for name in shapes} == shapes


@pytest.mark.parametrize("make", (resmlp, isotropic))
def test_every_activation_is_a_function_of_its_own(make) -> None:
    """Of the same weights."""
    nets = [make(activation=kind) for kind in ACTIVATIONS]
    x, found = images(nets[0]), []
    for net in nets:
        net.load_state_dict(nets[0].state_dict())
        found.append(net(x))
    assert all((a - b).abs().max() > 1e-6 for a, b in combinations(found, 2))


def test_a_fresh_convnext_has_weights_of_one_deviation() -> None:
    """0.02 in every layer, in the stored halves of filters too; biases are zero."""
    net = MirrorConvNeXt(**{**ISOTROPIC, "dims": (64,)})
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.25), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
