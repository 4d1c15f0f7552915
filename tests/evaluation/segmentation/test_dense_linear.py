"""The per-pixel linear probe: crops, head, windows; the same result on any number of processes."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from evaluation.segmentation import dense_training
from evaluation.segmentation.dense_head import (
    PixelHead,
    Statistics,
    drop_channels,
    learning_rate,
    whole_batch_statistics,
)
from evaluation.segmentation.dense_linear import PixelLinearProbe
from evaluation.segmentation.dense_transforms import (
    ClassTable,
    TrainingCrop,
    WholeImage,
    distort,
    round_to_patches,
)
from evaluation.segmentation.sliding_window import slide, window_starts
from tests.evaluation.backbones import any_backbone, make
from tests.evaluation.toys import ToyNet, in_processes
from utils.errors import UserError
from vit.backbone import Features

COLOURS = np.array([[0, 0, 0], [250, 30, 30], [30, 250, 30], [40, 40, 240]], dtype=np.uint8)


class ToyMasks:
    """Pictures of two colours; label 0 (black) is ignored, as in ADE20K."""

    name, ignore_labels = "toy", (0, 255)

    def __init__(self, length: int = 12, size: tuple[int, int] = (24, 32), seed: int = 0) -> None:
        self.class_names = ["nothing", "red", "green", "blue"]
        random = np.random.RandomState(seed)
        self.masks = []
        for _ in range(length):
            mask = np.full(size, random.randint(0, 4), dtype=np.uint8)
            mask[:, 4 * random.randint(1, size[1] // 4) :] = random.randint(1, 4)
            self.masks.append(mask)

    def __len__(self) -> int:
        return len(self.masks)

    def __repr__(self) -> str:
        return f"toy({len(self)} images)"

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(COLOURS[self.masks[index]])

    def read_mask(self, index: int) -> np.ndarray:
        return self.masks[index]

    def path(self, index: int) -> str:
        return f"toy {index}"


def make_probe(**changes) -> PixelLinearProbe:
    settings = {
        "train": ToyMasks(),
        "test": ToyMasks(5, (30, 24), seed=1),
        "crop_size": 16,
        "image_size": 24,
        "stride": 11,
        "photometric": False,
        "num_steps": 6,
        "warmup_steps": 2,
        "effective_batch_size": 4,
        "learning_rate": 0.1,
        "batch_size_per_gpu": 4,
        "num_workers": 0,
        "num_overlays": 2,
    }
    return PixelLinearProbe(**(settings | changes))


def test_it_finds_what_the_patches_tell(tmp_path: Path) -> None:
    """Where the colour of a patch is its label, the head finds it; overlays and files are there."""
    probe = make_probe(num_steps=60)
    figures = probe(ToyNet().eval(), {}, tmp_path)
    assert figures["pixel_linear_miou"] > 85 and figures["pixel_linear_acc"] > 90
    written = json.loads((tmp_path / "results.json").read_text())["seg_linear"]
    assert set(written["figures"]["IoU"]) == {"red", "green", "blue"}
    assert written["protocol"]["num_classes"] == 3 and written["protocol"]["num_steps"] == 60
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json", "overlays.png", "seg_linear_head.pt", "seg_linear_steps.jsonl",
    }  # fmt: skip
    lines = (tmp_path / "seg_linear_steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 50, 59]


@any_backbone
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_backbone(backbone, precision: str, tmp_path: Path) -> None:
    probe = make_probe(crop_size=32, image_size=40, num_steps=2, precision=precision)
    net = make(backbone)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():  # as within a training run
        figures = probe(net, {}, tmp_path)
    assert all(0 <= value <= 100 for value in figures.values())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.slow
def test_one_process_or_two_or_in_pieces_make_one_head(tmp_path: Path) -> None:
    """Neither the number of processes nor accumulation changes head or figures."""
    alone = fit_and_judge()
    assert fit_and_judge(batch_size_per_gpu=1) == pytest.approx(alone, rel=1e-4)
    for result in in_processes(fit_and_judge_in_halves, 2, tmp_path):
        assert result == pytest.approx(alone, rel=1e-4)


def fit_and_judge_in_halves() -> list[float]:
    return fit_and_judge(batch_size_per_gpu=1)


def fit_and_judge(**changes) -> list[float]:
    probe = make_probe(dropout_rate=0.3, photometric=True, **changes)
    net = ToyNet().eval()
    with tempfile.TemporaryDirectory() as folder:  # of each rank; rank 0 alone writes
        head = probe.fit(net, Path(folder))
    scores, shown = probe.evaluate(net, head)
    weights = [float(value.double().norm()) for value in head.state_dict().values()]
    assert sorted(shown) == [0, 4]
    return [*weights, scores.miou, scores.acc]


def test_a_stopped_probe_goes_on_bit_for_bit(tmp_path: Path, monkeypatch, capsys) -> None:
    net, whole = ToyNet().eval(), make_probe(checkpoint_every=2)
    expected = whole.fit(net, tmp_path / "whole").state_dict()

    def stop(self, step: int, loss: Tensor, rate: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dense_training.PixelHeadRun, "_log", stop)
        make_probe(checkpoint_every=2).fit(net, folder)
    found = make_probe(checkpoint_every=2).fit(net, folder).state_dict()
    assert "going on from the checkpoint of step 4" in capsys.readouterr().out
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_checkpoint_of_another_net_or_protocol_is_not_taken_up(tmp_path: Path, capsys) -> None:
    net = ToyNet().eval()
    make_probe(checkpoint_every=4).fit(net, tmp_path)
    make_probe(checkpoint_every=4, learning_rate=0.2).fit(net, tmp_path)
    assert "of another net or protocol, so anew" in capsys.readouterr().out
    with torch.no_grad():
        net.weight *= 1.1
    make_probe(checkpoint_every=4, learning_rate=0.2).fit(net, tmp_path)
    assert "of another net or protocol, so anew" in capsys.readouterr().out


def test_the_head_is_torchs_batch_norm_and_convolution() -> None:
    """In training and in evaluation, running statistics included."""
    torch.manual_seed(0)
    patches = torch.randn(4, 3, 5, 7) * 2 + 1
    head, norm, conv = PixelHead(7, 2), nn.BatchNorm2d(7), nn.Conv2d(7, 2, 1)
    conv.load_state_dict({"weight": head.linear.weight[:, :, None, None], "bias": head.linear.bias})
    statistics = whole_batch_statistics(patches.split(1))
    head.remember(statistics)
    expected = conv(norm(patches.movedim(-1, 1)))
    torch.testing.assert_close(head.classify(patches, statistics), expected)
    torch.testing.assert_close(head.mean, norm.running_mean)
    torch.testing.assert_close(head.variance, norm.running_var)
    norm.eval()
    torch.testing.assert_close(head(patches), conv(norm(patches.movedim(-1, 1))))
    assert isinstance(statistics, Statistics) and statistics.patches == 60


def test_dropout_takes_whole_channels_by_the_images_own_seed() -> None:
    patches, seeds = torch.ones(3, 2, 2, 1000), torch.tensor([5, 6, 5])
    dropped = drop_channels(patches, seeds, 0.25)
    assert torch.equal(dropped[0], dropped[2]) and not torch.equal(dropped[0], dropped[1])
    assert (dropped == dropped[:, :1, :1]).all()
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert 0.2 < float((dropped == 0).float().mean()) < 0.3


def test_the_rate_rises_then_falls_to_zero() -> None:
    rates = [learning_rate(s, base=1.0, num_steps=400, warmup_steps=20) for s in range(400)]
    assert rates[0] == 1e-6 and rates[-1] == 0 and rates.index(max(rates)) == 20
    assert all(later < earlier for earlier, later in zip(rates[20:], rates[21:], strict=False))
    assert rates[199] == pytest.approx(0.5)


def test_windows_cover_the_image_and_their_mean_is_the_image() -> None:
    assert window_starts(512, 512, 341) == [0]
    assert window_starts(683, 512, 341) == [0, 171]
    assert window_starts(1024, 512, 341) == [0, 341, 512]
    image = torch.rand(3, 23, 31)
    for batch_size in (1, 4):
        seen = slide(lambda x: 2 * x, image, window=10, stride=7, batch_size=batch_size)
        torch.testing.assert_close(seen, 2 * image)


def test_windows_that_patches_made_smaller_leave_no_gap(tmp_path: Path) -> None:
    """Of 18 pixels, the whole patches of 4 make 16, less than the stride."""
    probe, net = make_probe(crop_size=18, image_size=40, stride=18), ToyNet().eval()
    image = torch.rand(3, 40, 40)
    assert probe._logits(net, probe.fit(net, tmp_path), image, 16).isfinite().all()


def test_ignored_labels_have_no_class() -> None:
    table = ClassTable(151, (0, 255))
    assert len(table) == 150
    mask = np.array([[0, 1], [150, 255]], dtype=np.uint8)
    assert table.to_classes(mask).tolist() == [[255, 0], [149, 255]]
    assert table.labels[[0, 149]].tolist() == [1, 150]


@pytest.mark.parametrize("scale", [(0.5, 0.5), (2.0, 2.0)])
def test_crops_keep_image_and_mask_aligned(scale: tuple[float, float]) -> None:
    """Enlarged, shrunk and padded: the red pixels are those of class 0, apart from the seam."""
    mask = np.full((24, 32), 1, dtype=np.uint8)
    mask[:, 16:] = 2
    recipe = replace(
        make_probe().recipe,
        crop_size=20,
        image_size=24,
        scale=scale,
        hflip_probability=0.5,
        photometric=False,
    )
    crop = TrainingCrop(ClassTable(4, (0, 255)), recipe)
    torch.manual_seed(0)
    mirrored = set()
    for _ in range(20):
        pixels, classes, seed = crop((Image.fromarray(COLOURS[mask]), mask))
        assert pixels.shape == (3, 20, 20) and classes.shape == (20, 20) and seed >= 0
        padded = classes == 255
        assert bool(padded.any()) == (scale[0] < 1) and not pixels[:, padded].any()
        red = pixels[0] > 0
        assert ((classes == 0) != (red & ~padded)).float().mean() <= 0.1
        mirrored.add(int(classes[0, 0]))
    assert len(mirrored) == 2


@pytest.mark.parametrize("around", [0, 3], ids=["ignored", "one class"])
def test_crops_look_for_a_place_that_no_class_fills(around: int) -> None:
    """Of 57 places, 7 have less than three quarters of one class; ignored pixels have none."""
    mask = np.full((8, 64), around, dtype=np.uint8)
    mask[:, 30:32], mask[:, 32:34] = 1, 2
    recipe = replace(
        make_probe().recipe,
        crop_size=8,
        image_size=8,
        scale=(1.0, 1.0),
        hflip_probability=0.0,
        photometric=False,
    )
    crop = TrainingCrop(ClassTable(4, (0, 255)), recipe)
    shares = []
    for _ in range(60):
        _, classes, _ = crop((Image.fromarray(COLOURS[mask]), mask))
        counts = np.bincount(classes[classes != 255], minlength=3)
        shares.append(counts.max() / max(counts.sum(), 1))
    found = [share for share in shares if 0 < share < 0.75]
    assert len(found) > 30  # after ten tries 3 of 4; 7 without looking
    assert len(found) < 60, "after that, any place is taken"


def test_whole_images_keep_their_masks() -> None:
    mask = np.zeros((30, 20), dtype=np.uint8)
    image, kept = WholeImage(image_size=40)((Image.fromarray(COLOURS[mask]), mask))
    assert image.shape == (3, 60, 40) and kept.shape == (30, 20)


def test_distortion_changes_colours_only() -> None:
    torch.manual_seed(0)
    pixels = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
    found = [distort(pixels) for _ in range(20)]
    assert all(part.dtype == torch.uint8 and part.shape == pixels.shape for part in found)
    assert sum(torch.equal(part, pixels) for part in found) < 8


def test_distortion_is_as_strong_as_published() -> None:
    """Grey knows brightness and contrast alone; black is moved by brightness alone."""
    torch.manual_seed(0)
    grey, black = (torch.full((3, 2, 2), value, dtype=torch.uint8) for value in (100, 0))
    found = torch.stack([distort(grey) for _ in range(400)]).float()
    assert (found == found[:, :1, :1, :1]).all()
    levels = found[:, 0, 0, 0]
    assert 34 <= levels.min() < 50 and 170 < levels.max() <= 198  # (100 -+ 32) times 0.5 to 1.5
    same = (levels - 100).abs() <= 1  # the saturation of grey rounds down
    assert float(same.float().mean()) == pytest.approx(1 / 4, abs=0.06)
    dark = torch.stack([distort(black) for _ in range(400)])[:, 0, 0, 0]
    assert 32 < dark.max() <= 48
    assert float((dark > 0).float().mean()) == pytest.approx(1 / 4, abs=0.06)


def test_distortion_turns_hues_and_changes_saturation() -> None:
    """A pale red keeps being the reddest in half of the draws and some more."""
    torch.manual_seed(0)
    red = torch.tensor([200, 100, 100], dtype=torch.uint8)[:, None, None].expand(3, 2, 2)
    found = torch.stack([distort(red) for _ in range(400)])[..., 0, 0].float()
    assert 0.6 < float((found.argmax(1) == 0).float().mean()) < 0.75  # 1/2 + 1/2 * 1/3
    saturation = 1 - found.min(1).values / found.max(1).values
    assert saturation.min() < 0.3 and saturation.max() > 0.7


def test_sizes_become_whole_patches() -> None:
    assert [round_to_patches(512, size) for size in (14, 16)] == [518, 512]
    assert round_to_patches(3, 16) == 16


class Blind(ToyNet):
    """A net that drops its patches."""

    def features(self, images: Tensor, layers: tuple[int, ...] = (-1,)) -> list[Features]:
        return [found._replace(patches=None) for found in super().features(images, layers)]


@pytest.mark.parametrize(("changes", "expected"), [
    ({"precision": "fp8"}, "precision must be one of .*not 'fp8'"),
    ({"image_size": 8}, "image_size 8 must be at least crop_size 16"),
    ({"stride": 17}, "stride 17"),
    ({"num_overlays": -1}, "num_overlays must be a whole number from 0"),
    ({"warmup_steps": 7}, "warmup_steps must lie in .0, 6., not 7"),
    ({"scale": (2.0, 0.5)}, "scale takes the lesser value first"),
    ({"dropout_rate": 1.0}, "dropout_rate must lie in .0, 1., not 1.0"),
])  # fmt: skip
def test_bad_settings_are_one_line(changes, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        make_probe(**changes)
    assert "\n" not in str(error.value)


def test_other_classes_and_nets_without_patches_are_refused(tmp_path: Path) -> None:
    other = ToyMasks()
    other.class_names = ["nothing", "one", "two", "three"]
    with pytest.raises(ValueError, match="different classes: toy"):
        make_probe(test=other)
    with pytest.raises(UserError, match="Blind gives no patch tokens"):
        make_probe()(Blind().eval(), {}, tmp_path)


def test_a_batch_that_does_not_divide_the_step_is_made_smaller(tmp_path: Path) -> None:
    net = ToyNet().eval()
    figures = [
        make_probe(batch_size_per_gpu=size)(net, {}, tmp_path / str(size)) for size in (3, 2)
    ]
    assert figures[0] == figures[1]
