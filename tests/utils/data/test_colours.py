"""Colours of a batch on the device are Pillow's and torchvision's, to one level in 255."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import functional as published

from utils.data import colours
from utils.data.colour_plan import (
    JITTER,
    SLOTS,
    STRENGTHS,
    WIDTH,
    Colours,
    colour,
    draw_colours,
    plan_colours,
)


def make_images() -> list[Image.Image]:
    """Noise, a soft gradient with few colours, and greys."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (40, 52, 3))
    soft = np.indices((40, 52)).sum(0)[..., None] * np.array([2, 1, 3]) // 4 * 4
    grey = np.repeat(rng.integers(0, 256, (40, 52, 1)), 3, axis=2)
    return [Image.fromarray(array.astype(np.uint8)) for array in (noise, soft, grey)]


def levels(images: list[Image.Image]) -> Tensor:
    arrays = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    return torch.stack(arrays).float()


IMAGES = make_images()
BATCH = levels(IMAGES)
CASES = {
    "brightness": (colours.brightness, published.adjust_brightness, [0.6, 1.37, 1.0]),
    "contrast": (colours.contrast, published.adjust_contrast, [0.61, 1.4, 0.93]),
    "saturation": (colours.saturation, published.adjust_saturation, [0.8, 1.2, 1.1]),
    "hue": (colours.hue, published.adjust_hue, [0.1, -0.073, 0.033]),
    "hue, far": (colours.hue, published.adjust_hue, [-0.5, 0.5, 0.25]),
    "greyscale": (
        lambda images, _: colours.greyscale(images),
        lambda image, _: published.to_grayscale(image, 3),
        [0.0] * 3,
    ),
    "solarize": (
        lambda images, _: colours.solarize(images),
        lambda image, _: ImageOps.solarize(image, 128),
        [0.0] * 3,
    ),
    "torchvision's blur": (
        partial(colours.gaussian_blur, kernel_size=9),
        lambda image, sigma: published.gaussian_blur(image, [9, 9], [sigma, sigma]),
        [0.1, 0.7, 2.0],
    ),
    "Pillow's blur": (
        partial(colours.pillow_blur, reach=colours.pillow_reach(2.0)),
        lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius)),
        [0.1, 0.5, 2.0],
    ),
    "Pillow's blur, ties": (
        partial(colours.pillow_blur, reach=colours.pillow_reach(2.0)),
        lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius)),
        [1.0, 1.6, 0.3],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_operator_is_the_published_one(case):
    ours, theirs, strengths = CASES[case]
    expected = levels([theirs(*pair) for pair in zip(IMAGES, strengths, strict=True)])
    found = ours(BATCH, torch.tensor(strengths))
    assert (found - expected).abs().max() <= 1
    # Only torchvision's blur, a sum of products in another order, meets ties.
    assert (found != expected).float().mean() <= (1e-3 if "torchvision" in case else 0)


def test_normalizing():
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    expected = published.normalize(BATCH / 255, mean.tolist(), std.tolist())
    torch.testing.assert_close(colours.normalize(BATCH, mean, std), expected)


def test_a_plan_does_what_was_drawn_in_the_order_drawn():
    draws = np.full((3, WIDTH), np.nan, np.float32)
    draws[:, SLOTS] = [[3, 0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    draws[0, [0, 1, 3]] = 0.7, 1.3, 0.1  # contrast, hue, then brightness
    draws[1, STRENGTHS.index("greyscale")] = 1
    draws[2, STRENGTHS.index("solarize")] = 1
    plan = plan_colours(torch.from_numpy(draws), ("jitter", "greyscale", "blur", "solarize"))
    assert plan["names"] == ["contrast", "hue", "brightness", "greyscale", "solarize"]
    pixels = BATCH.to(torch.uint8)
    found = colour(pixels, plan)
    first = published.adjust_contrast(IMAGES[0], 1.3)
    first = published.adjust_brightness(published.adjust_hue(first, 0.1), 0.7)
    expected = [first, published.to_grayscale(IMAGES[1], 3), ImageOps.solarize(IMAGES[2], 128)]
    assert torch.equal(found, levels(expected))
    assert torch.equal(pixels.float(), BATCH), "the pixels are left as they were"


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_colours_are_the_same_and_stay_at_home(backend):
    """For any number of images of any size; a copy for a worker has no compiled code."""
    blur = partial(colours.gaussian_blur, kernel_size=3)
    plain, compiled = Colours(blur), Colours(blur)
    compiled.compile(backend=backend)
    np.random.seed(0)
    for count, size in ((6, 16), (9, 24), (5, 16)):
        pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
        draws = draw_colours(
            count,
            jitter=(0.4, 0.4, 0.2, 0.1),
            greyscale_probability=0.3,
            blur_probability=0.5,
            solarize_probability=0.3,
        )
        plan = plan_colours(torch.from_numpy(draws), ("jitter", "greyscale", "blur", "solarize"))
        found, expected = compiled(pixels, plan), plain(pixels, plan)
        assert torch.equal(found, expected)
        copy = pickle.loads(pickle.dumps(compiled))
        assert copy.operators.keys() == {"blur"}
        assert torch.equal(copy(pixels, plan), expected)


def test_a_plan_of_nothing():
    draws = draw_colours(3, jitter=(0, 0, 0, 0))
    plan = plan_colours(torch.from_numpy(draws), ("jitter", "blur"))
    assert torch.equal(colour(BATCH.to(torch.uint8), plan), BATCH)


def test_draws_are_spread_as_published():
    np.random.seed(0)
    count = 20_000
    draws = draw_colours(
        count,
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_probability=0.8,
        greyscale_probability=0.2,
        blur_probability=[0.1] * (count // 2) + [0.9] * (count // 2),
        solarize_probability=0.0,
    )
    acts = ~np.isnan(draws)
    assert acts[:, 0].mean() == pytest.approx(0.8, abs=0.01)
    assert (acts[:, :4].any(1) == acts[:, :4].all(1)).all()
    assert acts[:, 4].mean() == pytest.approx(0.2, abs=0.01)
    assert acts[: count // 2, 5].mean() == pytest.approx(0.1, abs=0.01)
    assert acts[count // 2 :, 5].mean() == pytest.approx(0.9, abs=0.01)
    assert not acts[:, 6].any()
    for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        values = np.sort(draws[acts[:, column], column])
        uniform = np.linspace(low, high, len(values))
        assert np.abs(values - uniform).max() < 0.02 * (high - low)
    orders, counts = np.unique(draws[:, SLOTS], axis=0, return_counts=True)
    assert len(orders) == 24 and counts.min() > 0.8 * count / 24
    assert len(JITTER) == draws[:, SLOTS].shape[1]


def test_draws_hang_on_nothing_else_that_is_drawn():
    """Each pair of choices comes as often as chance has it, and blurs as strong as published."""

    def draw(jitter_probability: float) -> np.ndarray:
        np.random.seed(0)
        others = {f"{name}_probability": 0.5 for name in ("greyscale", "blur", "solarize")}
        jitter = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_probability": jitter_probability}
        return draw_colours(20_000, **jitter, **others)

    always = draw(1.0)
    acts = ~np.isnan(draw(0.5)[:, [0, 4, 5, 6]])  # jitter, greyscale, blur, solarize
    chosen = np.column_stack([always[:, :4], always[:, SLOTS.start], acts])
    related = np.corrcoef(chosen, rowvar=False) - np.eye(chosen.shape[1])
    assert np.abs(related).max() < 0.03
    blurs = np.sort(always[acts[:, 2], 5])
    assert np.abs(blurs - np.linspace(0.1, 2.0, len(blurs))).max() < 0.04
