"""A config builds what is offered and what its constructor takes; all else is one line."""

import os
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from utils.config.build import build, check_targets, resolve
from utils.config.compose import compose_config
from utils.errors import UserError
from vit.adapters import NotRegistered


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "utils.config.build.sys.exit",
        "utils.config.build.importlib",
        "utils.config.build.importlib.import_module",
        "utils.nearest.nearest.__globals__",
        "utils.config.flags.argparse.ArgumentParser",
        "utils.config.compose.CONFIGS",
        "utils.metrics.json.loads",
        "timm.models.load_checkpoint",
        "timm.models.load_state_dict",
        "timm.utils.random_seed",
        "torch.load",
        "torch.optim.lr_scheduler.partial",
        "torch.hub.load",
        "slurm.job.Job",
        "utilsx.y",
        "utils..build",
        "utils",
        "",
        3,
        None,
    ],
)
def test_targets_outside_the_list_are_refused(target: object, monkeypatch) -> None:
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("was executed"))
    for node in ({"_target_": target}, {"a": [{"_target_": target}]}):
        with pytest.raises(UserError):
            build(node)
        with pytest.raises(UserError):
            check_targets(node)
    nested = {"_target_": "utils.schedules.Cosine", "base": {"_target_": target}}
    with pytest.raises(UserError):
        build(nested)


@pytest.mark.parametrize(
    "target",
    [
        "torch.optim.AdamW",
        "timm.create_model",
        "timm.models.vit_small_patch16_224",
        "timm.optim.Lamb",
        "torchvision.transforms.Resize",
        "octic.OcticVisionTransformer",
        "vit.models.dinov2_vit_small_patch16",
    ],
)
def test_offered_targets(target: str) -> None:
    assert callable(resolve(target))


def test_build_nests_and_overrides() -> None:
    import torch

    node = {"_target_": "torch.optim.AdamW", "_partial_": True, "betas": [0.8, 0.9], "lr": 1.0}
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = build({"a": [node]})["a"][0]([weight], lr=0.5)
    assert tuple(optimizer.defaults["betas"]) == (0.8, 0.9) and optimizer.defaults["lr"] == 0.5
    assert (
        build(OmegaConf.create({"x": {**node, "lr": "${y}"}, "y": 3}).x)([weight]).defaults["lr"]
        == 3
    )
    assert build(node, lr=0.25)([weight]).defaults["lr"] == 0.25


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("epohs", 3, "recipe: DINOv2 takes no 'epohs'; did you mean 'epochs'? (known: "),
        ("epochs", "ten", "recipe.epochs must be a number, got 'ten'"),
        ("batch_size_per_gpu", 2.5, "recipe.batch_size_per_gpu must be a whole number"),
        ("batch_size_per_gpu", True, "recipe.batch_size_per_gpu must be a whole number, got True"),
        ("separate_head", 1, "recipe.separate_head must be true or false"),
        ("crops", 3, "recipe.crops must be MultiCrop or FastMultiCrop or null, got 3"),
        ("_recursive_", True, "recipe: _recursive_ is not understood"),
        ("_target_", "dinov2.recipe.DINO", "has no 'DINO'; did you mean 'DINOv2'?"),
        ("_target_", "dinov2.recipee.DINOv2", "there is no module 'dinov2.recipee'"),
        ("_target_", "utils.images.ImageFolder", "did you mean 'utils.data.images.ImageFolder'?"),
    ],
)
def test_misspelt_keywords_inside_a_target(key: str, value: object, said: str) -> None:
    node = {"_target_": "dinov2.recipe.DINOv2", "_partial_": True, key: value}
    with pytest.raises(UserError) as caught:
        check_targets({"recipe": node})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "target", ["vit.models.dinov2_vit_small_patch16", "octic.models.hybrid_deit_small_patch16"]
)
def test_a_keyword_no_constructor_takes_is_told_with_the_known_ones(target: str) -> None:
    node = {"_target_": target, "_partial_": True, "dept": 2}
    with pytest.raises(UserError, match="no 'dept'; did you mean 'depth'.*known: .*embed_dim"):
        build(OmegaConf.create({"backbone": node}).backbone)()


def test_a_constructors_complaint_is_one_line_with_its_place() -> None:
    node = OmegaConf.create({"a": {"_target_": "dinov2.schedules.Schedules", "lr_scaling": "x"}})
    with pytest.raises(UserError, match=r"a.lr_scaling must be one of .*not 'x'"):
        build(node.a)
    missing = {"_target_": "utils.schedules.Cosine", "base": 1.0}
    with pytest.raises(UserError, match="also needs"):
        build(missing)


@pytest.mark.parametrize("key", ["output_dir", "name"])
def test_a_folder_may_be_called_by_a_number(key: str) -> None:
    assert compose_config("dinov2/quickstart.yaml", [f"{key}=2"])[key] == "2"


def needs_import(model_name: str) -> str:
    """Made once something has imported the module that registers the model."""
    if "registering_nets" not in sys.modules:
        raise NotRegistered(model_name, "")
    return model_name


def test_a_model_that_a_config_of_ours_names_is_imported_when_asked_for(
    tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "registering_nets.py").write_text("")
    (tmp_path / "other_nets.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OCTIC_PACKAGES", "tests")
    modules = {"wanted": "registering_nets", "other": "other_nets"}
    monkeypatch.setattr("utils.config.build.backbone_names", lambda: list(modules))
    monkeypatch.setattr(
        "utils.config.build.backbone_node", lambda name: {"_target_": f"{modules[name]}.{name}"}
    )
    node = {"_target_": "tests.utils.config.test_build.needs_import"}
    for unknown in ("other", "nowhere"):  # importing changes nothing; no config names it
        with pytest.raises(UserError, match=f"^timm has no model '{unknown}'$"):
            build({**node, "model_name": unknown})
    for partial in (True, False):
        monkeypatch.delitem(sys.modules, "registering_nets", raising=False)
        made = build({**node, "model_name": "wanted", "_partial_": partial})
        assert (made() if partial else made) == "wanted"
