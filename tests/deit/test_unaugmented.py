"""A recipe without augmentation: pixels as they are, decay of everything, a cosine of its own."""

import numpy as np
import pytest
import torch
from PIL import Image

from deit.schedules import EpochCosine, Schedules
from deit.unaugmented import Unaugmented
from tests.deit.tiny import make_batch, make_recipe


def test_pixels_are_normalised_and_nothing_else():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    steps = Unaugmented(input_size=16, mean=[0.5, 0.25, 0.0], std=[0.5, 1.0, 2.0])
    found = steps(Image.fromarray(pixels))
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.5, 0.25, 0.0]), torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(found, (expected - mean[:, None, None]) / std[:, None, None])
    assert steps(Image.fromarray(pixels[:10])).shape == (3, 16, 16), "another size is fitted"


def test_a_recipe_takes_it_and_trains():
    recipe = make_recipe(augmentation=Unaugmented(input_size=16), loss="ce")
    batch = recipe.prepare(next(iter(recipe.batches(0))))
    assert batch["images"].shape == (4, 3, 16, 16)
    assert recipe.losses(batch, 0)["loss"].isfinite()


@pytest.mark.parametrize("layerwise_decay", [1.0, 0.5])
def test_vectors_decay_when_asked_for(layerwise_decay):
    """All parameters in groups that decay; by default vectors are left out."""
    for asked in (True, False):
        recipe = make_recipe(decay_vectors=asked, layerwise_decay=layerwise_decay)
        spared = [
            parameter
            for group in recipe.param_groups()
            if not group["weight_decay_multiplier"]
            for parameter in group["params"]
        ]
        assert bool(spared) != asked
    assert recipe.losses(make_batch(), 0)["loss"].isfinite()


def test_a_cosine_after_the_warm_up():
    """From zero along a line to the base, then down to the end; the other begins at step 0."""
    rate = Schedules(
        lr=1.0, warmup_lr=0.0, min_lr=0.0, warmup_epochs=2, cosine_after_warmup=True
    ).build(epochs=10, epoch_length=5, batch_size=8)["lr"]
    assert [rate(0), rate(5), rate(10), rate(30), rate(50)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    ordinary = EpochCosine(base=1.0, final=0.0, epochs=10, epoch_length=5, warmup_epochs=2)
    assert ordinary(10) < 1


def test_a_constant_rate():
    """The published one of rotMNIST."""
    rate = Schedules(lr=1e-3, min_lr=1e-3, warmup_epochs=0).build(
        epochs=3, epoch_length=4, batch_size=8
    )["lr"]
    assert {rate(step) for step in range(20)} == {1e-3}
