"""Our models behave as timm's own do: the promises of timm's model tests, on small models.

The calls are those of timm's published `tests/test_models.py`, without torchscript and torch.fx.
Whoever has that file can run it on our models too:
OCTIC_TIMM_TESTS=<path> pytest -m slow tests/test_timm.py
"""

import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import FeatureInfo
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import octic
import vit
from baselines import dhvt, evit, flopping, gevit
from baselines.posthoc import vision_transformer
from baselines.token_reduction import swag
from utils.config.command_line import backbone_words
from utils.config.files import backbone_node

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = [
    "hybrid_deit_small_patch16",
    "d8_inv_early_deit_small_patch16",
    "hybrid_dinov2_vit_small_patch16",
    "d8_inv_early_dinov2_vit_small_patch16",
    "dinov2_vit_small_patch16",
    "deit_small_patch16_LS",
    "deit_small_patch16_18x2_LS",
    "d2_deit_small_patch16_LS",
    "hybrid_deit_small_patch16_LS",
    "d2_inv_early_deit_small_patch16_LS",
    "debug_ultra_hybrid_deit_tiny_patch16_LS",
]
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4}
GRID = 4
# What a classifier reads: the invariant half of equivariant tokens.
WIDTHS = {"d2_deit_small_patch16_LS": 32}
family = pytest.mark.parametrize("name", FAMILIES)
OURS = (octic.models, octic.mirror_models, octic.debug_models, vit.models)
BASELINES = (*(net.models for net in (dhvt, evit, flopping, gevit)), vision_transformer, swag)


def create(name: str, **options) -> nn.Module:
    return timm.create_model(name, **{**SMALL, **options}).eval()


def images(batch: int = 2, channels: int = 3, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(batch, channels, *size)


def registered() -> list[str]:
    """Names that the modules of `octic` and `vit` register."""
    return [name for module in OURS for name in module.default_cfgs]


def test_published_names_are_registered():
    """The published runs' models, and S and B sizes beside them, can be created by name."""
    dinov2 = [f"{size}_patch16" for size in ("small", "base", "large", "huge")]
    deit = ["small_patch16", "base_patch16", "large_patch16", "huge_patch14"]
    names = [f"dinov2_vit_{size}" for size in dinov2] + [f"deit_{size}_LS" for size in deit]
    for octic_family in ("hybrid", "d8_inv_early"):
        names += [f"{octic_family}_dinov2_vit_{size}" for size in dinov2]
        names += [f"{octic_family}_deit_{size}" for size in deit]
    more = ["tiny_patch16", "medium_patch16", "huge_patch14_52"]
    names += [f"deit_{size}_LS" for size in more]
    for mirror_family in ("d2", "hybrid", "d2_inv_early"):
        names += [f"{mirror_family}_deit_{size}_LS" for size in deit + more]
    names += [f"{name}_deit_tiny_patch16_LS" for name in ("debug_hybrid", "debug_ultra_hybrid")]
    for size in (
        "small_patch16_36",
        "base_patch16_36x1",
        "small_patch16_18x2",
        "base_patch16_18x2",
    ):
        names += [f"deit_{size}", f"deit_{size}_LS"]
    names.append("deit_huge_patch14_26x2_LS")
    assert set(names) == set(registered())


@pytest.mark.parametrize("module", [*OURS, *BASELINES], ids=lambda module: module.__name__)
def test_a_registered_name_is_a_function_of_its_module(module):
    """Under its own name, so that it can be imported and pickled, with one line of help."""
    assert sorted(module.__all__) == sorted(module.default_cfgs)
    for name in module.default_cfgs:
        function = getattr(module, name)
        assert timm.model_entrypoint(name) is function is pickle.loads(pickle.dumps(function))
        assert function.__name__ == name and function.__doc__.count("\n") == 0


@pytest.mark.parametrize("module", [*OURS, *BASELINES], ids=lambda module: module.__name__)
def test_a_registered_name_is_a_word_of_every_command(module):
    """By a file of configs/backbone, which says the size of the images if that is not 224."""
    for name, cfg in module.default_cfgs.items():
        assert backbone_words(name, []) == [f"backbone={name}"]
        node = backbone_node(name)
        assert node["_target_"] == f"{module.__name__}.{name}" and node["_partial_"]
        assert node.get("img_size", 224) == cfg.default.input_size[-1]


@pytest.mark.parametrize("name", registered())
def test_registered_models_build(name):
    """Every registered name builds, on the meta device, the model its default_cfg describes."""
    with torch.device("meta"):
        model = timm.create_model(name)
    assert model.num_classes == model.default_cfg["num_classes"]
    assert model.default_cfg["input_size"] == (3, *model.img_size)
    assert model.pretrained_cfg["architecture"] == name


@family
def test_forward(name):
    """One vector per image, no NaN, and the same with checkpointing switched on."""
    model, x = create(name), images()
    out = model(x)
    assert out.shape == (2, model.num_classes or model.num_features)
    assert not out.isnan().any()
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), out)


@family
def test_backward(name):
    """Every parameter, also a mask token no image needs, gets a gradient of its own shape."""
    model = create(name, num_classes=42).train()
    out = model(images())
    assert out.shape == (2, 42)
    out.mean().backward()
    without = [key for key, value in model.named_parameters() if value.grad is None]
    assert not without


@family
def test_gradient_checkpointing(name):
    """Recomputed activations give the same gradients."""
    model, x = create(name, num_classes=5).train(), images()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().mean().backward()
        gradients.append([value.grad for value in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@family
def test_default_cfg(name):
    """The names, sizes and widths a model tells of itself are true."""
    model = create(name, num_classes=7)
    state, cfg = model.state_dict(), model.default_cfg
    assert model.num_features == model.head_hidden_size == WIDTHS.get(name, SMALL["embed_dim"])
    assert f"{cfg['first_conv']}.weight" in state
    assert f"{cfg['classifier']}.weight" in state
    assert model.get_classifier() is model.head
    assert cfg["input_size"] == (3, 32, 32) or model.pretrained_cfg["input_size"] == (3, 224, 224)
    config = timm.data.resolve_data_config(model=model)
    assert timm.data.create_transform(**config) is not None


@family
def test_forward_features_and_head(name):
    """forward is forward_features, then forward_head; pre_logits is what the classifier reads."""
    model, x = create(name, num_classes=7), images()
    tokens = model.forward_features(x)
    assert tokens.shape == (2, model.num_prefix_tokens + GRID**2, model.num_features)
    pooled = model.forward_head(tokens, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.forward_head(tokens), model(x))
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))


@family
def test_reset_classifier(name):
    """Without classes the pooled feature comes out, without pooling the tokens; and back again."""
    model, x = create(name, num_classes=7), images()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(x), pooled)
    torch.testing.assert_close(create(name, num_classes=0)(x).shape, pooled.shape)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), model.forward_features(x))
    model.reset_classifier(3, "avg")
    assert model.num_classes == 3
    assert model(x).shape == (2, 3)
    assert create(name, num_classes=0, global_pool="")(x).ndim == 3


@family
@pytest.mark.parametrize("feature_cls", [None, "getter"])
def test_features_only(name, feature_cls):
    """features_only gives as many maps as feature_info announces, each of the announced size."""
    options = {} if feature_cls is None else {"feature_cls": feature_cls}
    model, x = create(name, features_only=True, **options), images()
    maps = model(x)
    assert len(maps) == len(model.feature_info.channels()) >= 3
    for channels, reduction, found in zip(
        model.feature_info.channels(), model.feature_info.reduction(), maps, strict=True
    ):
        side = math.ceil(32 / reduction)
        assert found.shape == (2, channels, side, side)
        assert not found.isnan().any()


@family
def test_features_only_out_indices(name):
    """Asked blocks come in order, and no block behind the last of them is kept."""
    model = create(name, features_only=True, out_indices=(0, 2))
    assert [tuple(found.shape) for found in model(images())] == [(2, 64, GRID, GRID)] * 2
    assert len(model.model.blocks) == 3


@family
def test_forward_intermediates(name):
    """All blocks' maps, and as final output the same as forward_features."""
    model, x = create(name), images()
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    output, maps = model.forward_intermediates(x, output_fmt="NCHW")
    assert len(maps) == len(info.channels()) == SMALL["depth"]
    for channels, reduction, found in zip(info.channels(), info.reduction(), maps, strict=True):
        assert found.shape == (2, channels, 32 // reduction, 32 // reduction)
        assert not found.isnan().any()
    torch.testing.assert_close(output, model.forward_features(x))
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(x)[0], output)


@family
def test_forward_intermediates_options(name):
    """Formats, prefix tokens, the final norm, early stop and negative indices."""
    model, x = create(name), images()
    tokens = model.forward_features(x)
    (last, prefix), *others = model.forward_intermediates(
        x,
        indices=[-1],
        return_prefix_tokens=True,
        norm=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    assert not others
    torch.testing.assert_close(torch.cat([prefix, last], dim=1), tokens)
    stopped = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(stopped[0], model.forward_intermediates(x)[1][1])


@family
def test_get_intermediate_layers(name):
    """DINOv2's spelling: the last n blocks, or listed ones, with or without the class token."""
    model, x = create(name), images()
    tokens = model.forward_features(x)
    *_, last = model.get_intermediate_layers(x, n=2, return_class_token=True)
    torch.testing.assert_close(last[0], tokens[:, model.num_prefix_tokens :])
    torch.testing.assert_close(last[1], tokens[:, 0])
    maps = model.get_intermediate_layers(x, n=[0, 3], reshape=True)
    assert [tuple(found.shape) for found in maps] == [(2, WIDTHS.get(name, 64), GRID, GRID)] * 2


@family
@pytest.mark.parametrize("size", [(48, 48), (16, 16), (24, 40)])
def test_other_input_sizes(name, size):
    """A model built for one size takes others, oblong ones too."""
    assert create(name, num_classes=3)(images(size=size)).shape == (2, 3)


@family
def test_built_for_another_size(name):
    """img_size sets the size of the stored positions."""
    model = create(name, num_classes=3, img_size=48)
    assert model(images(size=(48, 48))).shape == (2, 3)
    with pytest.raises(ValueError, match="32"):
        create(name, dynamic_img_size=False)(images(size=(48, 48)))


@family
@pytest.mark.parametrize("channels", [1, 5])
def test_in_chans(name, channels):
    """Images of other than three channels."""
    model = create(name, in_chans=channels, num_classes=3)
    assert model(images(channels=channels)).shape == (2, 3)


@family
def test_group_matcher_and_decay(name):
    """Every parameter has a layer group, in the order of the depth; no_weight_decay names exist."""
    model = create(name, num_classes=3)
    groups = timm.models.group_parameters(model, model.group_matcher())
    names = {key for key, _ in model.named_parameters()}
    assert {key for members in groups.values() for key in members} == names
    assert model.no_weight_decay() <= names
    layers = param_groups_layer_decay(model, no_weight_decay_list=set())
    assert len({group["lr_scale"] for group in layers}) == SMALL["depth"] + 2


@family
def test_state_round_trip(name, tmp_path):
    """A saved state loads through timm's checkpoint_path and gives the same logits."""
    model, x = create(name, num_classes=3), images()
    path = tmp_path / "model.safetensors"
    from safetensors.torch import save_file

    save_file(model.state_dict(), path)
    torch.testing.assert_close(create(name, num_classes=3, checkpoint_path=str(path))(x), model(x))


PLUGIN = '''
"""Shows timm's own test file our models alone, at a small size."""
import fnmatch
import octic, timm, vit

MODELS = {models}
SMALL = dict(embed_dim=64, depth=4, num_heads=4)
create = timm.create_model


def list_models(filter="", *, exclude_filters=(), pretrained=False, module="", **options):
    plain = "vit_*" in exclude_filters  # tests that want convolutional pyramids leave ViTs out
    return [] if plain or pretrained else MODELS


timm.list_models = list_models
timm.list_pretrained = lambda *args, **options: []
timm.create_model = lambda name, **options: create(name, **dict(SMALL, **options))
'''


@pytest.mark.slow
def test_timms_own_tests(tmp_path):
    """timm's published test file passes on our models; torchscript, fx, downloads left out."""
    tests = os.environ.get("OCTIC_TIMM_TESTS")
    if not tests:
        pytest.skip("OCTIC_TIMM_TESTS names no copy of timm's tests/test_models.py")
    copy = tmp_path / "test_models.py"
    copy.write_text(Path(tests).read_text())
    (tmp_path / "ours_alone.py").write_text(PLUGIN.format(models=FAMILIES))
    known = ("base", "cfg", "features", "torchscript", "fxforward", "fxbackward", "timeout")
    markers = "".join(f"    {marker}: timm\n" for marker in known)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\nmarkers =\n{markers}")
    left_out = "not torchscript and not fx and not pretrained and not inference"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "ours_alone", str(copy)),
            *("-k", f"test_model_ and {left_out}"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
