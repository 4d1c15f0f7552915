"""Crops coloured on the device: what Pillow makes one by one, in its distribution."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from dinov2.crops import MultiCrop
from dinov2.fast_crops import FastMultiCrop
from dinov2.masking import Collate, MaskSampler
from tests.dinov2.tiny import make_recipe
from utils.randomness import seed_cpu

PHOTOGRAPH = Image.fromarray(load_sample_image("flower.jpg")).resize((96, 64))
SIZES = {"global_crops_size": 32, "local_crops_size": 16, "local_crops_number": 3}
STILL = {
    "blur_probabilities": (0.0, 0.0, 0.0),
    "solarize_probability": 0.0,
    "color_jitter_probability": 0.0,
    "grayscale_probability": 0.0,
}


def batch_of(crops, count: int, seed: int = 0) -> dict:
    samples = []
    for number in range(count):
        seed_cpu(1000 * seed + number)
        samples.append((crops(PHOTOGRAPH), -1))
    return Collate(MaskSampler(), (4, 4))(samples, torch.Generator().manual_seed(seed))


def test_a_batch_is_that_of_the_published_crops():
    crops = FastMultiCrop(**SIZES)
    batch = batch_of(crops, 4)
    assert batch["global_crops"].dtype == batch["local_crops"].dtype == torch.uint8
    done, published = crops.finish(batch), batch_of(MultiCrop(**SIZES), 4)
    assert done.keys() == published.keys()
    for name in ("global_crops", "local_crops"):
        assert done[name].shape == published[name].shape
        assert done[name].dtype == torch.float32
    assert batch["global_crops"].dtype == torch.uint8, "a batch is not changed in place"


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("kind", [MultiCrop, FastMultiCrop])
def test_crops_are_mirrored_as_often_as_asked(kind, flip):
    """Of an image that brightens from left to right, both kinds of crops tell it."""
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], (64, 1, 3))
    crops = kind(**SIZES | STILL, flip_probability=flip)
    for seed in range(5):
        seed_cpu(seed)
        made = crops(Image.fromarray(ramp))
        for name in ("global_crops", "local_crops"):
            rise = made[name][..., -1].double() - made[name][..., 0].double()
            assert (rise < 0).all() if flip else (rise > 0).all()


@pytest.mark.parametrize(
    ("options", "coloured", "share"),
    [
        ({"solarize_probability": 1.0}, "second", 1.0),
        # The smallest blurs change no level.
        ({"blur_probabilities": (1.0, 0.0, 0.0)}, "first", 0.6),
        ({"blur_probabilities": (0.0, 1.0, 0.0)}, "second", 0.6),
        ({"blur_probabilities": (0.0, 0.0, 1.0)}, "local", 0.6),
    ],
)
def test_crops_come_crop_major_with_their_own_colours(options, coloured, share):
    """The second global crop alone is solarized, each is blurred for itself, wherever it comes."""
    found = []
    for chosen in ({}, options):
        crops = FastMultiCrop(**SIZES | STILL | chosen)
        done = crops.finish(batch_of(crops, 5))
        first, second = done["global_crops"].chunk(2)
        found.append({"first": first, "second": second, "local": done["local_crops"]})
    for name, plain in found[0].items():
        changed = [not torch.equal(*pair) for pair in zip(found[1][name], plain, strict=True)]
        assert sum(changed) >= share * len(plain) if name == coloured else not any(changed), name


@pytest.mark.parametrize("moment", ["mean", "std", "roughness", "greyness"])
def test_images_are_spread_as_the_published_ones(moment):
    """Over 400 draws each, the moments of the crops agree within four standard errors."""

    def measured(crops) -> np.ndarray:
        images = torch.stack([crops[index] for index in range(len(crops))])
        if moment == "mean":
            return images.mean((1, 2, 3)).numpy()
        if moment == "std":
            return images.std((1, 2, 3)).numpy()
        if moment == "roughness":
            return images.diff(dim=-1).abs().mean((1, 2, 3)).numpy()
        return images.std(1).mean((1, 2)).numpy()

    ours, theirs = FastMultiCrop(**SIZES), MultiCrop(**SIZES)
    found, expected = ours.finish(batch_of(ours, 400)), batch_of(theirs, 400, seed=1)
    for part in ("global_crops", "local_crops"):
        a, b = measured(found[part]), measured(expected[part])
        error = (a.var() / len(a) + b.var() / len(b)) ** 0.5
        assert abs(a.mean() - b.mean()) < 4 * error, part
        assert a.std() == pytest.approx(b.std(), rel=0.25), part


def test_crops_depend_on_the_seed_alone():
    crops = FastMultiCrop(**SIZES)
    random.seed(9)
    first = crops.finish(batch_of(crops, 3))
    np.random.seed(7)
    second = crops.finish(batch_of(crops, 3))
    assert torch.equal(first["global_crops"], second["global_crops"])
    assert torch.equal(first["local_crops"], second["local_crops"])


def test_a_recipe_trains_on_them():
    crops = FastMultiCrop(
        global_crops_size=16, local_crops_size=8, local_crops_number=2, blur_kernel_size=3
    )
    recipe = make_recipe(crops=crops)
    batch = next(recipe.batches(0))
    losses = recipe.losses(recipe.prepare(batch), 0)
    assert losses["loss"].isfinite()


def test_bad_crops_are_refused_alike():
    for kind in (MultiCrop, FastMultiCrop):
        with pytest.raises(ValueError, match="three values"):
            kind(blur_probabilities=(0.5,))
