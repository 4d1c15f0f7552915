"""One call judges any net: ours from an exported file, timm's by name; wrong files are refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from evaluation.judge import judge, make_net
from slurm.job import Job
from tests.evaluation.backbones import BACKBONES
from utils.errors import UserError

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
TINY["init_values"] = 1.0  # else the class token hardly looks at the image before training
OCTIC = {"_target_": "octic.models.hybrid_dinov2_vit_small_patch16", "_partial_": True, **TINY}
PLAIN = {"_target_": "vit.models.dinov2_vit_small_patch16", "_partial_": True, **TINY}
TIMM = {
    "_target_": "vit.adapters.timm_backbone",
    "_partial_": True,
    "model_name": "vit_tiny_patch16_224",
    **TINY,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve images of two colours, in a folder per colour."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    for colour in ("red", "blue"):
        (root / colour).mkdir()
        for shade in range(6):
            image = Image.new("RGB", (20, 20), colour)
            image.putpixel((shade, shade), (255, 255, 255))
            image.save(root / colour / f"{shade}.png")
    return root


def config(images, folder, backbone, weights=None):
    data = {"_target_": "utils.data.images.ImageFolder", "root": str(images)}
    probe = {"_target_": "evaluation.knn.KnnProbe", "ks": [3], "resize_size": 16, "crop_size": 16}
    return {
        "output_dir": str(folder),
        "backbone": backbone,
        "weights": weights,
        "seed": 0,
        "device": "cpu",
        "data": {"train": data, "val": data},
        "probes": {"knn": probe},
    }


@pytest.mark.parametrize(
    "backbone",
    [OCTIC, PLAIN, TIMM, BACKBONES["torchvision"]],
    ids=["octic", "plain", "timm", "torchvision"],
)
def test_any_backbone_is_judged(backbone, images, tmp_path, capsys):
    figures = judge(config(images, tmp_path, backbone))
    assert figures["knn/knn3_top1"] == 100
    printed = capsys.readouterr().out
    assert "judging the random initialisation" in printed
    assert "protocol: class token" in printed
    assert (tmp_path / "knn" / "results_eval_knn.json").exists()
    results = json.loads((tmp_path / "results.json").read_text())["knn"]
    assert results["figures"]["knn3_top1"] == 100
    assert results["protocol"]["weights"] is None


def test_weights_are_loaded_strictly(images, tmp_path):
    net = make_net(OCTIC, None, seed=1)
    state = {f"backbone.{name}": value for name, value in net.state_dict().items()}
    torch.save({"teacher": state}, tmp_path / "w")
    found = make_net(OCTIC, str(tmp_path / "w"), seed=2)
    for name, value in net.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    with pytest.raises(UserError, match="missing.*left over"):
        make_net(PLAIN, str(tmp_path / "w"))
    with pytest.raises(UserError, match="no such weights file"):
        make_net(PLAIN, str(tmp_path / "nothing.pth"))


def test_timm_weights_are_loaded_into_the_wrapped_net(tmp_path):
    net = make_net(TIMM, None, seed=1)
    torch.save(net.net.state_dict(), tmp_path / "timm.pth")
    found = make_net(TIMM, str(tmp_path / "timm.pth"), seed=2)
    assert torch.equal(found.net.cls_token, net.net.cls_token)


@pytest.mark.parametrize("backbone", [OCTIC, TIMM], ids=["octic", "timm"])
def test_a_run_folder_brings_the_sizes_of_its_net(backbone, tmp_path):
    """The file says what its net was built with; nobody must repeat it."""
    net = make_net(backbone, None, seed=1)
    file = tmp_path / "run/exported/model.safetensors"
    file.parent.mkdir(parents=True)
    state = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(state, file, {"constructor": json.dumps(backbone)})
    named = {key: value for key, value in backbone.items() if key not in TINY}
    found = make_net(named, str(tmp_path / "run"), seed=2).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    with pytest.raises(UserError, match="without exported"):
        make_net(named, str(tmp_path))


def test_a_mistake_that_shows_late_is_one_line(images, tmp_path):
    """A size that the net cannot take, found when the first image goes through it."""
    wrong = config(images, tmp_path, OCTIC)
    wrong["probes"]["knn"] |= {"resize_size": 20, "crop_size": 20}
    with pytest.raises(UserError, match=r"not a multiple of the patch size 8 \(vit/trunk.py"):
        Job("evaluation.judge.judge", wrong)()


def test_a_net_without_features_is_refused():
    with pytest.raises(UserError, match="no Backbone.*use backbone=timm"):
        make_net({"_target_": "timm.models.resnet18"}, None)


def test_both_splits_are_needed(images, tmp_path):
    wrong = config(images, tmp_path, OCTIC)
    wrong["data"]["val"] = None
    with pytest.raises(UserError, match="data.val is missing"):
        judge(wrong)
