"""Patches and their labels go together, for every kind of net; what cannot work is one line."""

import numpy as np
import pytest
import torch

from evaluation.segmentation.patches import (
    extract_patches,
    label_patches,
    majority_labels,
    resolve_precision,
    shape_of,
    split_images,
)
from evaluation.segmentation.store import PatchStore
from tests.evaluation.backbones import any_backbone, make
from tests.evaluation.segmentation.toys import ToyMasks
from tests.evaluation.toys import ToyNet
from utils.data.segmentation_transforms import squash
from utils.errors import UserError
from vit.backbone import Features


class NoPatches(ToyNet):
    def features(self, images, layers=(-1,)):
        return [Features(found.cls, None) for found in super().features(images, layers)]


class Broken(ToyNet):
    def features(self, images, layers=(-1,)):
        return [Features(f.cls, f.patches / 0) for f in super().features(images, layers)]


class WrongGrid(ToyNet):
    def features(self, images, layers=(-1,)):
        return [Features(f.cls, f.patches[:, :1]) for f in super().features(images, layers)]


def test_split_is_numpys():
    train, val = split_images(30, seed=0)
    assert val + train == np.random.RandomState(0).permutation(30).tolist()
    assert len(val) == 3
    assert split_images(9)[1] == []


def test_labels_by_patch():
    """Row by row inside a patch, and the smallest label on ties."""
    mask = torch.arange(16, dtype=torch.uint8).view(1, 4, 4)
    cells = label_patches(mask, 2)
    assert cells.shape == (1, 2, 2, 4)
    assert cells[0, 0, 1].tolist() == [2, 3, 6, 7]
    wide = label_patches(torch.cat([mask, mask + 20], dim=2), 2)
    assert wide.shape == (1, 2, 4, 4) and wide[0, 1, 2].tolist() == [28, 29, 32, 33]
    labels = torch.tensor([[5, 5, 2, 2], [255, 1, 255, 1], [9, 0, 9, 9]], dtype=torch.uint8)
    assert majority_labels(labels).tolist() == [2, 1, 9]


@any_backbone
def test_features_of_any_backbone(backbone):
    """The store holds what the net gives for each squashed image, in the order asked for."""
    net, data, order = make(backbone), ToyMasks(5), [3, 0, 4]
    store = PatchStore(shape_of(net, 3, 32), dtype=torch.float32, folder=None)
    extract_patches(net, data, order, store, resolution=32, batch_size=2)
    for place, index in enumerate(order):
        image, mask = squash(data.read(index), data.read_mask(index), 32)
        with torch.no_grad():
            patches = net.features(image[None])[0].patches.flatten(0, 2)
        share = slice(16 * place, 16 * (place + 1))
        torch.testing.assert_close(store.rows.read(share.start, share.stop), patches)
        assert torch.equal(store.labels[share], label_patches(mask[None], 8).flatten(0, 2))


def test_mistakes():
    with pytest.raises(
        UserError,
        match="resolution 30 x 30 is not a multiple of the patch size 4; 28 x 28 and 32 x 32 are",
    ):
        shape_of(ToyNet(), 1, 30)
    for net, message in (
        (NoPatches(), "NoPatches gives no patch tokens"),
        (WrongGrid(), "shape"),
        (Broken(), "finite features; some of .* are inf or nan"),
    ):
        store = PatchStore(shape_of(net, 2, 8), dtype=torch.float32, folder=None)
        with pytest.raises(UserError, match=message):
            extract_patches(net, ToyMasks(2), [0, 1], store, resolution=8)


def test_precision():
    assert resolve_precision("auto", ToyNet()) == "fp32"
    assert resolve_precision("bf16", ToyNet()) == "bf16"
