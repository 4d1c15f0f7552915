"""3-Augment coloured on the device: what Pillow makes one by one, in its distribution."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms.functional import to_tensor

from deit.augment import ThreeAugment
from deit.fast_augment import FastThreeAugment
from deit.mixing import Collate, Mixing
from tests.deit.tiny import make_recipe
from utils.data.colour_plan import finished
from utils.randomness import seed_cpu

PHOTOGRAPH = Image.fromarray(load_sample_image("flower.jpg")).resize((96, 64))


def batch_of(augmentation, count: int, seed: int = 0) -> dict:
    samples = []
    for number in range(count):
        seed_cpu(1000 * seed + number)
        samples.append((augmentation(PHOTOGRAPH), number % 3))
    return finished(augmentation, Collate()(samples, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("crop", ["random_resized", "simple"])
@pytest.mark.parametrize("moment", ["mean", "std", "roughness", "greyness"])
def test_images_are_spread_as_the_published_ones(crop, moment):
    """Over 400 draws each, the moments of the images agree within four standard errors."""

    def measured(images: torch.Tensor) -> np.ndarray:
        if moment == "roughness":
            images = images.diff(dim=-1).abs()
        if moment == "greyness":
            return images.std(1).mean((1, 2)).numpy()
        return (images.std((1, 2, 3)) if moment == "std" else images.mean((1, 2, 3))).numpy()

    options = {"input_size": 32, "crop": crop}
    a = measured(batch_of(FastThreeAugment(**options), 400)["images"])
    b = measured(batch_of(ThreeAugment(**options), 400, seed=1)["images"])
    error = (a.var() / len(a) + b.var() / len(b)) ** 0.5
    assert abs(a.mean() - b.mean()) < 4 * error
    assert a.std() == pytest.approx(b.std(), rel=0.25)


def test_exactly_one_of_three():
    """Grey, solarised or blurred, each in a third of the images."""
    augmentation = FastThreeAugment(input_size=16, color_jitter=0.0)
    names = []
    for number in range(300):
        seed_cpu(number)
        names += [Collate()([(augmentation(PHOTOGRAPH), 0)], torch.Generator())["colours"]["names"]]
    assert all(len(found) == 1 for found in names)
    counts = [sum(found == [name] for found in names) for name in ("greyscale", "solarize", "blur")]
    assert sum(counts) == 300 and min(counts) > 70


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("kind", [ThreeAugment, FastThreeAugment])
def test_without_colours_an_image_is_what_was_cut(kind, flip):
    """Here the whole of it, mirrored always or never, in the mean and deviation asked for."""
    square = PHOTOGRAPH.resize((20, 20))
    whole = to_tensor(square.resize((16, 16), Image.Resampling.BICUBIC))
    expected = (whole.flip(-1) if flip else whole) / 0.5 - 0.25
    options = {"input_size": 16, "scale": (1, 1), "mean": (0.125,) * 3, "std": (0.5,) * 3}
    still = kind(flip_probability=flip, three_probability=0.0, color_jitter=0.0, **options)
    for seed in range(5):
        seed_cpu(seed)
        batch = finished(still, Collate()([(still(square), 0)], torch.Generator()))
        assert (batch["images"][0] - expected).abs().max() < 4 / 255


def test_a_recipe_trains_on_them_and_mixes_them():
    recipe = make_recipe(augmentation=FastThreeAugment(input_size=16), mixing=Mixing())
    batch = recipe.prepare(next(recipe.batches(0)))
    assert batch["images"].dtype == torch.float32 and batch["targets"].shape == (4, 3)
    assert recipe.losses(batch, 0)["loss"].isfinite()
    again = recipe.prepare(next(recipe.batches(0)))
    assert torch.equal(batch["images"], again["images"])
    assert torch.equal(batch["targets"], again["targets"])


def test_unknown_crop():
    with pytest.raises(ValueError, match="random_resized, simple"):
        FastThreeAugment(crop="centre")
