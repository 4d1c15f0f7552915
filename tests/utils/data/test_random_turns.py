"""Random turns: which positions come out, how often, and that the seed decides."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from utils.data.random_turns import RandomTurn
from utils.data.transforms import evaluation_transform
from utils.symmetry import SYMMETRIES, transform_image

CONVERT = evaluation_transform(resize_size=8, crop_size=8)
PICTURE = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8), mode="RGB"
)


def positions(augment: RandomTurn, count: int) -> Counter[str]:
    """How often each symmetry of the picture comes out; KeyError for anything else."""
    known = {transform_image(CONVERT(PICTURE), e).numpy().tobytes(): e for e in SYMMETRIES}
    return Counter(known[augment(PICTURE).contiguous().numpy().tobytes()] for _ in range(count))


def test_quarter_turns_reach_the_eight_positions_alike():
    random.seed(0)
    found = positions(RandomTurn(turns="quarter", augmentation=CONVERT), 800)
    assert set(found) == set(SYMMETRIES)
    assert all(60 < count < 145 for count in found.values())


def test_without_mirroring_four_are_left():
    random.seed(0)
    found = positions(RandomTurn(turns="quarter", mirrored=0.0, augmentation=CONVERT), 100)
    assert set(found) == {"e", "r", "rr", "rrr"}


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_any_angle_follows_the_seed(interpolation):
    augment = RandomTurn(augmentation=CONVERT, interpolation=interpolation)
    random.seed(3)
    first, second = augment(PICTURE), augment(PICTURE)
    random.seed(3)
    assert torch.equal(augment(PICTURE), first) and not torch.equal(second, first)


def test_the_nearest_pixel_makes_no_new_colours():
    random.seed(0)
    turned = np.asarray(RandomTurn(interpolation="nearest")(PICTURE)).reshape(-1, 3)
    colours = {tuple(c) for c in np.asarray(PICTURE).reshape(-1, 3)} | {(0, 0, 0)}
    assert {tuple(c) for c in turned} <= colours


def test_without_an_augmentation_it_gives_images_and_finishes_nothing():
    batch = {"images": torch.zeros(1)}
    assert isinstance(RandomTurn()(PICTURE), Image.Image) and RandomTurn().finish(batch) is batch


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"turns": "half"}, "turns must be one of any, quarter, not 'half'"),
        (
            {"interpolation": "bicubic"},
            "interpolation must be one of bilinear, nearest, not 'bicubic'",
        ),
        ({"mirrored": 1.5}, "mirrored"),
    ],
)
def test_what_it_does_not_know_is_refused(words, said):
    with pytest.raises(ValueError, match=said):
        RandomTurn(**words)
