"""The command that writes features of any folder, with any net, to one array."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.commands.extract_features import parse_extraction, read_extraction_arguments
from evaluation.features.extraction import FeatureReader, extract
from evaluation.probes.knn import KnnProbe
from tests.evaluation.backbones import BACKBONES, EMBED_DIM, IMAGE_SIZE, any_backbone, make
from tests.evaluation.toys import ToyNet
from utils.data.images import ImageFolder
from utils.data.transforms import evaluation_transform
from utils.errors import UserError
from vit.backbone import Features


@pytest.fixture
def images(tmp_path):
    root = tmp_path / "images"
    for colour in ("red", "blue"):
        (root / colour).mkdir(parents=True)
        for shade in range(4):
            image = Image.new("RGB", (36, 40), colour)
            image.putpixel((shade, shade), (255, 255, 255))
            image.save(root / colour / f"{shade}.png")
    return root


def config(images, tmp_path, **changes):
    from utils.config.build import plain
    from utils.config.compose import compose_config

    words = [f"data.root='{images}'", f"output_dir='{tmp_path / 'F'}'", "device=cpu"]
    words += [f"resize_size={IMAGE_SIZE}", f"crop_size={IMAGE_SIZE}", "num_workers=0"]
    return plain(compose_config("extract.yaml", words, base="extract")) | changes


@any_backbone
def test_any_backbone_and_every_feature(backbone, images, tmp_path, capsys):
    grid = IMAGE_SIZE // 8
    shapes = {
        "cls": (8, EMBED_DIM),
        "cls_patchmean": (8, 2 * EMBED_DIM),
        "patches": (8, grid, grid, EMBED_DIM),
    }
    arrays = {}
    for feature, shape in shapes.items():
        changes = {"backbone": backbone, "feature": feature, "overwrite": True}
        folder = extract(config(images, tmp_path, **changes))
        arrays[feature] = np.load(f"{folder}/features.npy", mmap_mode="r").copy()
        assert arrays[feature].shape == shape
        assert arrays[feature].dtype == np.float32
    joined = np.concatenate([arrays["cls"], arrays["patches"].mean((1, 2))], axis=1)
    np.testing.assert_allclose(arrays["cls_patchmean"], joined, rtol=1e-4, atol=1e-5)
    printed = capsys.readouterr().out
    assert "features: 8 of 8" in printed and "np.load(" in printed
    lines = list(csv.DictReader(Path(folder, "index.csv").read_text().splitlines()))
    assert [line["class_name"] for line in lines] == ["blue"] * 4 + ["red"] * 4


def test_several_blocks_normalised_in_half_precision(images, tmp_path):
    changes = {"layers": [-2, -1], "normalized": True, "dtype": "float16", "split": "val"}
    changes["backbone"] = {"_target_": "vit.models.dinov2_vit_small_patch16", "img_size": 32}
    settings = config(images, tmp_path, **changes)
    settings["data"] = {"val": {"_target_": "utils.data.images.ImageFolder", "root": str(images)}}
    folder = extract(settings)
    rows = np.load(f"{folder}/features.npy", mmap_mode="r")
    assert rows.dtype == np.float16
    assert rows.shape == (8, 2 * 384)
    np.testing.assert_allclose(np.linalg.norm(rows.astype(float), axis=1), 1, atol=1e-3)
    meta = json.loads(Path(folder, "meta.json").read_text())
    assert meta["feature"] == "class token of blocks -2, -1 after the final norm"


def test_features_are_of_the_transform_and_precision_that_are_told(images, tmp_path):
    """The white pixel near the corner is enlarged, then cut off."""
    sizes = {"resize_size": 48, "crop_size": IMAGE_SIZE}
    settings = config(images, tmp_path, backbone=BACKBONES["octic"], precision="bf16", **sizes)
    folder = extract(settings)
    net, transform = make(BACKBONES["octic"], seed=settings["seed"]), evaluation_transform(**sizes)
    shown = ImageFolder(images)
    pixels = torch.stack([transform(shown.read(index)) for index in range(8)])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = net.features(pixels)[0].cls.float()
    np.testing.assert_allclose(np.load(f"{folder}/features.npy"), expected, rtol=1e-5, atol=1e-6)
    meta = json.loads(Path(folder, "meta.json").read_text())
    assert meta["transform"] == f"resize 48, centre crop {IMAGE_SIZE}, bicubic"
    assert meta["precision"] == "bf16"


def test_images_without_labels(images, tmp_path):
    settings = config(images, tmp_path)
    settings["data"]["train"]["labels"] = False
    folder = extract(settings)
    assert np.load(f"{folder}/labels.npy").tolist() == [-1] * 8
    lines = list(csv.DictReader(Path(folder, "index.csv").read_text().splitlines()))
    assert (lines[0]["label"], lines[0]["class_name"]) == ("", "")


def test_what_is_there_is_refused_unless_overwritten(images, tmp_path):
    extract(config(images, tmp_path))
    with pytest.raises(UserError, match="it holds these features; --overwrite"):
        extract(config(images, tmp_path))
    with pytest.raises(UserError, match="other features .precision is 'fp32' there, 'bf16' here"):
        extract(config(images, tmp_path, precision="bf16"))
    extract(config(images, tmp_path, precision="bf16", overwrite=True))
    (tmp_path / "F" / "train").mkdir()
    (tmp_path / "F" / "train" / "thesis.txt").write_text("mine")
    settings = config(images, tmp_path, split="train", overwrite=True)
    settings["data"]["train"] = {"_target_": "utils.data.images.ImageFolder", "root": str(images)}
    with pytest.raises(UserError, match="holds no features; give another OUTPUT"):
        extract(settings)


def test_probes_read_what_the_command_wrote(images, tmp_path, capsys):
    settings = config(images, tmp_path, split="train")
    settings["data"]["train"] = {"_target_": "utils.data.images.ImageFolder", "root": str(images)}
    extract(settings)
    from evaluation.nets import make_net

    net = make_net(settings["backbone"], None)
    options = {"resize_size": IMAGE_SIZE, "crop_size": IMAGE_SIZE}
    probe = KnnProbe(ks=[1], features_dir=str(tmp_path / "F"), **options)
    folder = ImageFolder(images)
    figures = probe(net, {"train": folder, "val": folder}, tmp_path / "out")
    assert figures["knn1_top1"] == 100
    assert f"train features: read from {tmp_path / 'F' / 'train'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature": "token"}, "feature must be one of .*, not 'token'"),
        ({"dtype": "half"}, "dtype must be one of .*float32, float16.*, not 'half'"),
        ({"layers": []}, "layers names no block"),
        ({"layers": ["x"]}, "layers: a block is a whole number, such as -1, not 'x'"),
        ({"layers": [-1.5]}, "layers: a block is a whole number, such as -1, not -1.5"),
        ({"layers": [40]}, "there is no block 40; the net has"),
        ({"layers": [12]}, "there is no block 12; the net has 12"),
        ({"layers": [-13]}, "there is no block -13; the net has 12"),
        ({"split": "tset"}, "split must be one of .*, not 'tset'"),
        ({"data": {"train": {"_target_": "utils.data.embedded.digits"}}}, "split=all is for"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(changes, message, images, tmp_path):
    with pytest.raises(ValueError, match=message):
        extract(config(images, tmp_path, **changes))


def test_a_net_that_drops_tokens_has_no_patches():
    class Dropping(ToyNet):
        def features(self, images, layers=(-1,)):
            return [Features(cls=torch.zeros(len(images), 6), patches=None) for _ in layers]

    reader = FeatureReader(kind="patches", layers=[-1], normalized=False)
    with pytest.raises(UserError, match="the net drops tokens"):
        reader(Dropping(), torch.zeros(2, 3, 8, 8))


def test_maps_of_a_pyramid_are_refused_side_by_side():
    class Pyramid:
        def features(self, images, layers):
            maps = {-1: torch.ones(2, 2, 2, 6), -2: torch.ones(2, 4, 4, 6)}
            return [Features(torch.zeros(2, 6), maps[layer]) for layer in layers]

    for kind, layers in {"cls_patchmean": (-2, -1), "patches": (-2,)}.items():
        FeatureReader(kind=kind, layers=layers, normalized=False)(Pyramid(), torch.zeros(2))
    reader = FeatureReader(kind="patches", layers=(-2, -1), normalized=False)
    with pytest.raises(UserError, match="maps of 2 x 2, 4 x 4 patches.*one of layers=.-2, -1."):
        reader(Pyramid(), torch.zeros(2))


def test_command_line():
    words = ["OUT", "--model", "vit_tiny_patch16_224", "--weights", "w's.pth", "--layers", "-2,-1"]
    settings = parse_extraction([*words, "--feature=patches", "--overwrite", "data.root=D"])
    assert settings["output_dir"] == "OUT"
    assert settings["backbone"]["model_name"] == "vit_tiny_patch16_224"
    assert (settings["weights"], settings["feature"]) == ("w's.pth", "patches")
    assert (settings["layers"], settings["overwrite"]) == ([-2, -1], True)
    assert settings["data"]["train"]["root"] == "D"
    with pytest.raises(UserError, match="two output folders"):
        read_extraction_arguments(["a", "b"])
    with pytest.raises(UserError, match="--weights needs a value"):
        read_extraction_arguments(["--weights", "--overwrite"])


def test_reader_gives_the_class_token_of_the_probes():
    net = make(
        {"_target_": "vit.models.dinov2_vit_small_patch16", "img_size": 32, "_partial_": True}
    )
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        rows = FeatureReader(kind="cls", layers=[-1], normalized=False)(net, pixels)
        torch.testing.assert_close(rows, net.features(pixels)[0].cls)


def with_weights(weights):
    """A net that brings its weights."""
    return make(BACKBONES["timm"])


def test_only_a_net_without_weights_is_called_random(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OCTIC_PACKAGES", "tests")
    node = {"_target_": f"{__name__}.with_weights", "_partial_": True, "weights": "its own"}
    for backbone, random in ((BACKBONES["timm"], True), (node, False)):
        folder = extract(config(images, tmp_path, backbone=backbone, overwrite=True))
        assert ("random initialisation" in capsys.readouterr().out) == random
        meta = json.loads(Path(folder, "meta.json").read_text())
        assert meta["weights"] == (None if random else "its own")
