"""A network is made from an exported file alone; a file names no more than registered models."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import octic  # noqa: F401  (registers the models)
from vit.adapters import TimmBackbone
from vit.exported import build_from
from vit.finetune import load_adapted
from vit.weights import load_weights

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}


def small() -> nn.Module:
    """A small model of a registered family."""
    return timm.create_model("d8_inv_early_dinov2_vit_small_patch16", **SMALL)


def exported(folder: Path, net: nn.Module, made: dict[str, Any]) -> Path:
    """The file that a run exports."""
    path = folder / "exported/model.safetensors"
    path.parent.mkdir(parents=True)
    save_file(net.state_dict(), path, {"constructor": json.dumps({**made, "_partial_": True})})
    return path


@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("octic.models.hybrid_deit_small_patch16", {"group": "C4"}),
        ("octic.mirror_models.d2_deit_small_patch16_LS", {}),
        ("vit.models.deit_small_patch16_LS", {"init_values": None}),
        ("vit.adapters.timm_backbone", {"model_name": "vit_tiny_patch16_224"}),
    ],
)
def test_a_network_is_built_from_its_file_alone(target, options, num_classes, tmp_path):
    """Sizes are the file's; the number of classes too, which a run may leave to its images."""
    options = {**SMALL, **options}
    if target == "vit.adapters.timm_backbone":
        net = TimmBackbone(**options, num_classes=num_classes)
    else:
        net = timm.model_entrypoint(target.rpartition(".")[2])(**options, num_classes=num_classes)
    path = exported(tmp_path, net, {"_target_": target, **options})
    again, images = build_from(path), torch.randn(2, 3, 32, 32)
    assert type(again) is type(net) and not again.training
    assert torch.equal(again(images), net.eval()(images))


def test_a_file_builds_nothing_but_registered_models(tmp_path):
    """Whoever wrote it."""
    net = small()
    names = ("os.system", "mine.deit_small_patch16_LS", "vit.vision_transformer.VisionTransformer")
    for number, target in enumerate(names):
        path = exported(tmp_path / str(number), net, {"_target_": target, "command": "true"})
        with pytest.raises(ValueError, match=f"is of {target}, which is not registered with timm"):
            build_from(path)
    made = {"_target_": "vit.adapters.timm_backbone", "model_name": "hf-hub:some/net"}
    with pytest.raises(ValueError, match="is of hf-hub:some/net, which is not registered"):
        build_from(exported(tmp_path / "hub", net, made))
    save_file(net.state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="does not say which network it is of"):
        build_from(tmp_path / "bare.safetensors")


def test_a_folder_is_told_from_a_file_that_does_not_exist(tmp_path):
    """And its weights are named, for a run's folder and for one in the hub's format."""
    net = small()
    path = exported(tmp_path / "run", net, {"_target_": "x.y"})
    hub = tmp_path / "hub/model.safetensors"
    hub.parent.mkdir()
    save_file(net.state_dict(), hub)
    (tmp_path / "empty").mkdir()
    for load in (load_weights, load_adapted, lambda _, folder: build_from(folder)):
        for folder, file in ((tmp_path / "run", path), (hub.parent, hub)):
            with pytest.raises(ValueError, match=f"^{folder}: is a folder; give {file}$"):
                load(net, folder)
        with pytest.raises(ValueError, match="empty: is a folder$"):
            load(net, tmp_path / "empty")
        with pytest.raises(ValueError, match="nowhere: no such weights file$"):
            load(net, tmp_path / "nowhere")
