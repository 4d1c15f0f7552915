"""Every trainable parameter is in one group; plain and octic ones of a kind are treated alike."""

import pytest

from dinov2.param_groups import multipliers, param_groups
from tests.dinov2.tiny import make_backbone, make_recipe

DEPTH = 4


def found(family: str, **options):
    return multipliers(make_backbone(family, depth=DEPTH)(), **options)


@pytest.mark.parametrize("family", ["plain", "hybrid", "invariant"])
def test_biases_norms_and_layer_scales_are_not_decayed(family):
    for name, value in found(family).items():
        last = name.split(".")[-1]
        vector = last in ("bias", "gamma", "beta") or last.startswith("alpha_") or "norm" in name
        assert value.weight_decay == (0.0 if vector else 1.0), name


@pytest.mark.parametrize("family", ["plain", "hybrid", "invariant"])
def test_rates_fall_towards_the_image(family):
    rates = {name: value.lr for name, value in found(family).items()}
    assert {rates[n] for n in rates if n.startswith("norm.")} == {1.0}
    for index in range(DEPTH):
        block = {rates[n] for n in rates if n.startswith(f"blocks.{index}.")}
        assert block == {0.9 ** (DEPTH - index)}
    for name, rate in rates.items():
        if name.split(".")[0] in ("cls_token", "mask_token", "pos_embed"):
            assert rate == pytest.approx(0.9 ** (DEPTH + 1)), name
        if name.startswith("patch_embed."):
            assert rate == pytest.approx(0.2 * 0.9 ** (DEPTH + 1)), name


def test_the_projection_at_the_switch_counts_with_the_block_before_it():
    rates = found("invariant")
    assert rates["invariant_proj.weight"].lr == rates["blocks.1.attn.proj.lin_A1.weight"].lr
    published = found("invariant", published=True)
    assert published["invariant_proj.weight"].lr == 1.0


def test_the_published_grouping_decays_octic_layer_scales():
    octic, plain = "blocks.0.ls1.alpha_A2", "blocks.3.ls1.gamma"
    assert found("hybrid", published=True)[octic].weight_decay == 1.0
    assert found("hybrid", published=True)[plain].weight_decay == 0.0
    assert found("hybrid")[octic].weight_decay == found("hybrid")[plain].weight_decay == 0.0


def test_frozen_parameters_are_left_out():
    backbone = make_backbone()()
    backbone.cls_token.requires_grad_(False)
    assert "cls_token" not in multipliers(backbone)
    grouped = [p for g in param_groups({"backbone": backbone}) for p in g["params"]]
    assert len(grouped) == len(list(backbone.parameters())) - 1


@pytest.mark.parametrize("published", [False, True])
def test_all_of_the_student_and_nothing_of_the_teacher(published):
    recipe = make_recipe("invariant", separate_head=True, published_param_groups=published)
    grouped = [id(p) for group in recipe.param_groups() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in recipe.student.parameters())


def test_only_the_last_layers_have_their_own_schedule():
    recipe = make_recipe(separate_head=True)
    last = [
        p for g in recipe.param_groups() if g["lr_schedule"] == "last_layer_lr" for p in g["params"]
    ]
    expected = [p for n, p in recipe.student.named_parameters() if "last_layer" in n]
    assert {id(p) for p in last} == {id(p) for p in expected}


@pytest.mark.parametrize("published", [False, True])
def test_the_recipe_hands_its_options_on(published):
    options = {"layerwise_decay": 0.5, "patch_embed_lr_multiplier": 0.1}
    recipe = make_recipe("invariant", published_param_groups=published, **options)
    told = {
        id(p): (g["lr_multiplier"], g["weight_decay_multiplier"])
        for g in recipe.param_groups()
        for p in g["params"]
    }
    backbone = recipe.student["backbone"]
    wanted = multipliers(backbone, published=published, **options)
    for name, parameter in backbone.named_parameters():
        assert told[id(parameter)] == (wanted[name].lr, wanted[name].weight_decay), name
