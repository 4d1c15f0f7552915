"""Pictures of what a net keeps: only kept patches show, and a net that keeps all is refused."""

import pytest
import torch
from PIL import Image

from evaluation.classifier import judge_classifier
from evaluation.commands.draw import parse_drawing
from evaluation.commands.eval_deit import parse_deit_evaluation
from evaluation.draw import draw
from evaluation.pictures.token_mask import TokenMaskProbe, masked, stages
from tests.evaluation.backbones import BACKBONES
from tests.evaluation.toys import ToyImages
from utils.config.build import build
from utils.errors import UserError

EVIT = {
    "_target_": "baselines.evit.models.deit_small_patch16_shrink_base",
    "_partial_": True,
    **{"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2},
    **{"base_keep_rate": 0.5, "drop_loc": [1, 2], "fuse_token": True},
}


@pytest.fixture(autouse=True)
def embedded(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("OCTIC_DATA", str(tmp_path_factory.getbasetemp() / "data"))


def test_only_kept_patches_are_left():
    images = torch.rand(2, 3, 8, 12) + 1
    kept = torch.zeros(2, 2, 3, dtype=torch.bool)
    kept[0, 1, 2] = kept[1, 0, 0] = True
    shown = masked(images, kept)
    assert torch.equal(shown[0, :, 4:, 8:], images[0, :, 4:, 8:])
    assert int((shown != 0).sum()) == 2 * 3 * 4 * 4


def test_drawing(tmp_path):
    words = ["token_mask", str(tmp_path), "num_images=2", "device=cpu"]
    paths = draw({**parse_drawing(words), "backbone": EVIT})
    assert [path.name for path in paths[:3]] == ["token_mask.png", "img_0_a.jpg", "img_1_a.jpg"]
    assert {path.name for path in tmp_path.glob("*.jpg")} == {
        f"img_{i}_{kind}.jpg" for i in (0, 1) for kind in ("a", "l0", "l1")
    }
    with Image.open(tmp_path / "img_0_l1.jpg") as image:
        assert image.size == (32, 32)


def test_flags_of_the_published_evaluation(tmp_path):
    """--visualize_mask and --test_speed beside the accuracy; --only_test_speed needs no images."""
    words = ["--visualize_mask", "--n_visualization", "3", "--test_speed", "data=digits"]
    words += ["device=cpu", f"output_dir={tmp_path}/all", "probes.accuracy.num_workers=0"]
    config = parse_deit_evaluation([*words, "probes.throughput.batch_size=2", "model=x"][:-1])
    config["probes"]["throughput"] |= {"steps": 1, "repeats": 2}
    figures = judge_classifier({**config, "backbone": EVIT})
    assert len(list((tmp_path / "all" / "token_mask").glob("img_*_l1.jpg"))) == 3
    assert figures["throughput/images_per_second"] > 0
    assert figures["token_mask/kept_1"] == 50 and figures["token_mask/kept_2"] < 35
    alone = parse_deit_evaluation(["--only_test_speed", "device=cpu", f"output_dir={tmp_path}/s"])
    alone["probes"]["throughput"] |= {"steps": 1, "repeats": 2, "batch_size": 2}
    figures = judge_classifier({**alone, "backbone": EVIT})
    assert set(figures) == {"throughput/images_per_second", "throughput/gmacs"}


def test_nets_that_keep_all_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not tell which patches it keeps"):
        stages(build({**BACKBONES["timm"], "_partial_": True})(), torch.rand(1, 3, 32, 32))
    whole = build({**EVIT, "base_keep_rate": 1.0})()
    with pytest.raises(UserError, match="keeps every patch"):
        TokenMaskProbe(num_images=2)(whole, {"val": ToyImages(4, 0)}, tmp_path)
