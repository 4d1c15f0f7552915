"""The head of the per-pixel probe is trained, and its figures counted, as plain torch would."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from evaluation.segmentation.dense_head import PixelHead, learning_rate
from evaluation.segmentation.dense_training import upsample
from evaluation.segmentation.dense_transforms import WholeImage
from tests.evaluation.segmentation.test_dense_linear import ToyMasks, make_probe
from tests.evaluation.toys import ToyNet


def test_a_training_is_torchs_adamw_on_the_pixels_of_whole_steps(tmp_path: Path) -> None:
    """In micro-batches; each step has all four pictures, uncropped. Ignored pixels weigh as 0."""
    whole = {"crop_size": 16, "image_size": 16, "scale": (1.0, 1.0), "hflip_probability": 0.0}
    rates = {"learning_rate": 0.1, "weight_decay": 0.5, "num_steps": 5, "warmup_steps": 2}
    train = ToyMasks(4, (16, 16))
    probe = make_probe(train=train, **whole, **rates, dropout_rate=0.0, batch_size_per_gpu=2)
    net, pairs = ToyNet().eval(), [(train.read(i), train.read_mask(i)) for i in range(4)]
    images = torch.stack([WholeImage(image_size=16)(pair)[0] for pair in pairs])
    classes = torch.from_numpy(np.stack([probe.table.to_classes(mask) for _, mask in pairs])).long()
    assert 0 < (classes == 255).sum() < classes.numel()
    head = PixelHead(net.embed_dim, 3, seed=0)
    plain = nn.Sequential(nn.BatchNorm2d(net.embed_dim), nn.Conv2d(net.embed_dim, 3, 1))
    plain[1].load_state_dict(
        {"weight": head.linear.weight[:, :, None, None], "bias": head.linear.bias}
    )
    optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0.5)
    for step in range(5):
        rate = learning_rate(step, base=0.1, num_steps=5, warmup_steps=2)
        optimizer.param_groups[0]["lr"] = rate
        logits = plain(net.features(images)[0].patches.detach().movedim(-1, 1))
        logits = nn.functional.interpolate(logits, size=(16, 16), mode="bilinear")
        losses = nn.functional.cross_entropy(logits, classes, ignore_index=255, reduction="none")
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    found, grid = probe.fit(net, tmp_path), torch.randn(1, 4, 4, net.embed_dim)
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(found(grid), plain.eval()(grid.movedim(-1, 1)), **close)
    logged = (tmp_path / "seg_linear_steps.jsonl").read_text().splitlines()[-1]
    assert json.loads(logged)["loss"] == pytest.approx(float(losses.detach().mean()), rel=1e-3)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"dropout_rate": 0.5}, "mean"),
        ({"photometric": True}, "mean"),
        ({"hflip_probability": 1.0}, "mean"),
        ({"scale": (1.5, 1.5)}, "mean"),
        ({"seed": 1}, "mean"),
        ({"seed": 1}, "linear.weight"),
    ],
)
def test_a_setting_of_the_training_reaches_images_or_head(
    change, part: str, tmp_path: Path
) -> None:
    """A seed both: it draws the crops, whose mean the head remembers, and the first weights."""
    plain = {"dropout_rate": 0.0, "hflip_probability": 0.0, "scale": (1.0, 1.0)}
    plain |= {"num_steps": 1, "warmup_steps": 1}  # whose rate leaves the weights as they are
    one, other = (
        make_probe(**(plain | more)).fit(ToyNet().eval(), tmp_path / str(len(more))).state_dict()
        for more in ({}, change)
    )
    assert (one[part] - other[part]).abs().max() > 1e-3


class NoisyMasks(ToyMasks):
    """Half of each pixel is noise; label 3 occurs nowhere, and a strip at the top is ignored."""

    def __init__(self) -> None:
        super().__init__(5, (30, 24), seed=1)
        self.masks = [np.where(mask == 3, 2, mask).astype(np.uint8) for mask in self.masks]
        for mask in self.masks:
            mask[:5] = 0

    def read(self, index: int) -> Image.Image:
        noise = np.random.RandomState(index).randint(256, size=(30, 24, 3), dtype=np.uint8)
        return Image.blend(super().read(index), Image.fromarray(noise), 0.5)


def test_figures_are_counted_over_windows_that_overlap(tmp_path: Path, monkeypatch) -> None:
    """By hand: mean logits of the windows, at the size of the mask; ignored pixels do not count."""
    probe, net, pixels = make_probe(test=NoisyMasks()), ToyNet().eval(), []
    head = PixelHead(net.embed_dim, 3)
    nn.init.normal_(head.linear.weight)
    monkeypatch.setattr(probe, "fit", lambda *_: head)
    figures = probe(net, {}, tmp_path)
    for index in range(len(probe.test)):
        mask = probe.test.read_mask(index)
        image, _ = WholeImage(image_size=24)((probe.test.read(index), mask))
        height, width = image.shape[1:]
        total, times = torch.zeros(3, height, width), torch.zeros(height, width)
        for top in {*range(0, height - 16, 11), height - 16}:
            for left in {*range(0, width - 16, 11), width - 16}:
                place = (..., slice(top, top + 16), slice(left, left + 16))
                logits = head(net.features(image[place][None])[0].patches)
                total[place] += upsample(logits, torch.Size((16, 16)))[0].detach()
                times[place] += 1
        logits = upsample((total / times)[None], torch.Size(mask.shape))[0]
        labels = torch.from_numpy(mask.astype(int))
        pixels.append(torch.stack([logits.argmax(0) + 1, labels])[:, labels > 0])
    found, wanted = torch.cat(pixels, dim=1)
    both = {
        label: ((found == label) & (wanted == label), (found == label) | (wanted == label))
        for label in wanted.unique().tolist()
    }
    ious = {label: 100 * float(one.sum() / either.sum()) for label, (one, either) in both.items()}
    assert all(0 < iou < 90 for iou in ious.values()) and len(ious) == 2
    assert figures["pixel_linear_miou"] == pytest.approx(sum(ious.values()) / (len(ious) + 1))
    assert figures["pixel_linear_acc"] == pytest.approx(
        100 * float((found == wanted).float().mean())
    )
    assert figures["pixel_linear_miou_classes"] == pytest.approx(sum(ious.values()) / len(ious))
    written = json.loads((tmp_path / "results.json").read_text())["seg_linear"]["figures"]
    names = probe.test.class_names
    assert written["IoU"] == pytest.approx({names[label]: iou for label, iou in ious.items()})
