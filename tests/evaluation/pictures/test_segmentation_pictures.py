"""Overlays colour the labels, leave ignored pixels bare, and name what is seen."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.pictures.segmentation import PALETTE, draw_segmentation, overlay

NAMES = ["background", *(f"class {n}" for n in range(1, 60))]


def test_an_overlay_mixes_colours_where_labels_count() -> None:
    image = Image.new("RGB", (4, 2), (255, 255, 255))
    labels = np.array([[0, 0, 1, 1], [0, 0, 255, 255]], dtype=np.uint8)
    mixed = overlay(image, labels, labels == 255)
    assert mixed.shape == (2, 4, 3) and (mixed[1, 2:] == 1).all()
    np.testing.assert_allclose(mixed[0, 2], 0.4 + 0.6 * PALETTE[1])
    np.testing.assert_allclose(PALETTE[15] * 255, [192, 128, 128])  # VOC's person


def test_masks_of_any_size_fit_any_image(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    images = [Image.new("RGB", (40, 30), "white"), Image.new("RGB", (20, 50), "grey")]
    masks = [random.randint(0, 60, (30, 40)), np.full((50, 20), 255)]
    predictions = [random.randint(0, 60, (15, 20)), np.zeros((25, 10), dtype=int)]
    path = draw_segmentation(
        images,
        [mask.astype(np.uint8) for mask in masks],
        [labels.astype(np.uint8) for labels in predictions],
        tmp_path / "below" / "overlays.png",
        class_names=NAMES,
        ignore=(255,),
    )
    with Image.open(path) as drawn:
        assert drawn.size[0] > 300 and drawn.size[1] > 300


def test_unequal_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 images, 0 masks and 0 predictions"):
        draw_segmentation([Image.new("RGB", (4, 4))], [], [], tmp_path / "x.png", class_names=NAMES)
