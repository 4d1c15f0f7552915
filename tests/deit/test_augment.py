"""Augmentation and mixing: what comes out, and that it depends on the seeds alone."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from deit.augment import (
    ERASE_MODES,
    INTERPOLATIONS,
    SMALL,
    GaussianBlur,
    ThreeAugment,
    TimmAugmentation,
    posterize,
)
from deit.mixing import Collate, Mixing
from utils.randomness import seed_cpu

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8))


def augment(transform, seed: int) -> torch.Tensor:
    seed_cpu(seed)
    return transform(IMAGE)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ThreeAugment(input_size=24),
        lambda: ThreeAugment(input_size=24, crop="simple"),
        lambda: TimmAugmentation(input_size=48),
        lambda: TimmAugmentation(input_size=SMALL),
    ],
)
def test_size_and_reproducibility(make):
    transform = pickle.loads(pickle.dumps(make()))
    first = augment(transform, 1)
    side = transform.input_size
    assert first.shape == (3, side, side) and first.dtype == torch.float32
    assert torch.equal(first, augment(transform, 1))
    assert not torch.equal(first, augment(transform, 2))


@pytest.mark.parametrize("bits", range(9))
def test_posterize_keeps_the_highest_bits(bits):
    expected = np.asarray(IMAGE) & np.uint8(256 - 2 ** (8 - bits) if bits else 0)
    assert np.array_equal(np.asarray(posterize(IMAGE, bits)), expected)


@pytest.mark.parametrize(
    "policy", ["rand-m10-n6-inc1", "original", "originalr", "v0", "v0r", "3a", "augmix-m10"]
)
def test_every_magnitude_of_timms_policies_gives_an_image(policy):
    """The greatest one asks for no bits at all, which Pillow refuses."""
    transform = TimmAugmentation(input_size=8, auto_augment=policy)
    for seed in range(60):
        assert augment(transform, seed).isfinite().all()


@pytest.mark.parametrize("mode", ERASE_MODES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_every_word_that_is_offered_gives_images(mode, interpolation):
    transform = TimmAugmentation(
        input_size=40, interpolation=interpolation, erase_mode=mode, erase_probability=1.0
    )
    for seed in range(20):
        assert augment(transform, seed).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"erase_mode": "noise"}, "erase_mode must be one of const, rand, pixel, not 'noise'"),
        # Pillow resizes by it, and turns nothing: a worker would find out at its first turn.
        (
            {"interpolation": "lanczos"},
            "interpolation must be one of bicubic, bilinear, nearest, random, not 'lanczos'",
        ),
        ({"auto_augment": "best"}, "auto_augment 'best': Unknown AA policy"),
        ({"auto_augment": "rand-w0"}, "auto_augment 'rand-w0': Unknown RandAugment"),
    ],
)
def test_what_timm_does_not_know_is_told_before_a_run(options, message):
    with pytest.raises(ValueError, match=message):
        TimmAugmentation(**options)


def test_images_smaller_than_the_crop_are_padded():
    assert TimmAugmentation(input_size=32)(Image.new("RGB", (16, 16))).shape == (3, 32, 32)


def test_one_of_the_three_is_always_applied():
    """Without crop, flip and jitter, what is left is grey, solarised or blurred; each comes."""
    transform = ThreeAugment(
        input_size=40, color_jitter=0.0, flip_probability=0.0, mean=(0, 0, 0), std=(1, 1, 1)
    )
    three = transform.steps.transforms[2]
    solarised = np.asarray(ImageOps.solarize(IMAGE, 128))
    found = []
    for seed in range(60):
        random.seed(seed)
        torch.manual_seed(seed)
        image = np.asarray(three(IMAGE))
        if (image[..., 0] == image[..., 1]).all():
            found.append("grey")
        elif np.array_equal(image, solarised):
            found.append("solarised")
        else:
            assert image.astype(float).std() < np.asarray(IMAGE).astype(float).std()
            found.append("blurred")
    assert all(found.count(kind) >= 10 for kind in ("grey", "solarised", "blurred"))


def test_blur_within_its_range():
    random.seed(0)
    assert np.array_equal(np.asarray(GaussianBlur((0.0, 0.0))(IMAGE)), np.asarray(IMAGE))


def test_unknown_crop():
    with pytest.raises(ValueError, match="random_resized, simple"):
        ThreeAugment(crop="centre")


SAMPLES = [(torch.full((3, 8, 8), float(i)), i) for i in range(6)]


def collate(seed: int, **options) -> dict[str, torch.Tensor]:
    batch = Collate()(SAMPLES, torch.Generator().manual_seed(seed))
    return Mixing(**options).build(6)(batch)


def test_mixtures_tell_their_shares():
    """Of constant images the mean tells the share, whichever of the two mixed them."""
    kinds = set()
    for seed in range(20):
        batch = collate(seed)
        classes = torch.arange(6.0)
        torch.testing.assert_close(batch["targets"].sum(1), torch.ones(6))
        mean = batch["images"].mean((1, 2, 3))
        torch.testing.assert_close(batch["targets"] @ classes, mean, atol=1e-4, rtol=1e-4)
        kinds.add("cutmix" if (batch["images"] % 1 == 0).all() else "mixup")
    assert kinds == {"cutmix", "mixup"}


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixing_depends_on_the_generator_alone(mode):
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    first = collate(1, mode=mode)
    assert np.array_equal(before, np.random.get_state()[1])
    np.random.seed(6)
    second, other = collate(1, mode=mode), collate(2, mode=mode)
    assert torch.equal(first["images"], second["images"])
    assert torch.equal(first["targets"], second["targets"])
    assert not torch.equal(first["images"], other["images"])


def test_without_mixing_labels_stay_labels():
    batch = Collate()(SAMPLES, torch.Generator())
    assert batch["targets"].tolist() == list(range(6)) and batch["images"].shape == (6, 3, 8, 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "all"}, "batch, pair"),
        ({"mixup": 0, "cutmix": 0}, "null"),
        ({"cutmix_minmax": []}, "cutmix_minmax takes two values"),
    ],
)
def test_bad_mixing(options, said):
    with pytest.raises(ValueError, match=said):
        Mixing(**options)
