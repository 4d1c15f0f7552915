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
from utils.errors import UserError
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


def levels(seed: int, image: Image.Image, **options) -> torch.Tensor:
    """Pixels [3 S S] of an image under timm's augmentation without a policy, as whole levels."""
    still = {"auto_augment": None, "color_jitter": 0.0, "mean": (0,) * 3, "std": (1 / 255,) * 3}
    made = TimmAugmentation(**{"input_size": 40, "erase_probability": 0.0, **still, **options})
    seed_cpu(seed)
    return made(image).round()


def test_erasing_and_jitter_do_what_they_are_asked():
    """Seen on an image of one colour; a box of colour is one more colour in it."""

    def colours(**options) -> set[int]:
        flat = Image.new("RGB", (60, 50), (90, 120, 150))
        made = [levels(seed, flat, **options).flatten(1) for seed in range(10)]
        return {len(pixels.unique(dim=1).T) for pixels in made}

    assert colours() == {1}
    const = {"erase_probability": 1.0, "erase_mode": "const"}
    assert colours(**const) == {2}
    assert colours(**const, erase_count=3) == {2}
    assert colours(**const | {"erase_mode": "rand"}) == {2}
    assert colours(**const | {"erase_mode": "rand"}, erase_count=3) == {2, 3, 4}
    assert min(colours(**const | {"erase_mode": "pixel"})) > 10
    flat = Image.new("RGB", (60, 50), (90, 120, 150))
    plain, jittered = (levels(0, flat, color_jitter=strength) for strength in (0.0, 0.8))
    assert plain[:, 0, 0].tolist() == [90, 120, 150] != jittered[:, 0, 0].tolist()


def test_the_nearest_pixel_brings_no_new_level():
    stripes = Image.fromarray(np.tile(np.uint8([0, 200]), (50, 60))).convert("RGB")
    for seed in range(5):
        assert set(levels(seed, stripes, interpolation="nearest").unique().tolist()) == {0, 200}
        assert len(levels(seed, stripes, interpolation="bicubic").unique()) > 2


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


def test_labels_are_smoothed_as_much_as_is_asked():
    """Also those of images that are not mixed: 0.3 is dealt out evenly over the classes."""
    batch = Collate()(SAMPLES, torch.Generator())
    mixed = Mixing(probability=0.0).build(6, smoothing=0.3)(batch)
    torch.testing.assert_close(mixed["targets"], 0.7 * torch.eye(6) + 0.3 / 6)


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"mixup": 0.0}, {"cutmix"}),
        ({"cutmix": 0.0}, {"mixup"}),
        ({"switch_probability": 1.0}, {"cutmix"}),
        ({"switch_probability": 0.0}, {"mixup"}),
        ({"probability": 0.0}, {"nothing"}),
        ({"probability": 0.5, "cutmix": 0.0}, {"mixup", "nothing"}),
    ],
)
def test_which_of_the_two_mixes(options, kinds):
    found = set()
    for seed in range(20):
        batch = collate(seed, **{"cutmix": 1e4} | options)  # boxes of a half are never empty
        whole = (batch["images"] % 1 == 0).all()
        plain = torch.equal(batch["targets"], torch.eye(6))
        found.add("nothing" if plain else "cutmix" if whole else "mixup")
    assert found == kinds


def own_shares(**options) -> torch.Tensor:
    """What each image keeps of itself, over some batches [batches images]."""
    return torch.stack([collate(seed, **options)["targets"].diagonal() for seed in range(20)])


def test_shares_are_drawn_as_asked():
    assert (own_shares(mixup=1e4, cutmix=0.0) - 0.5).abs().max() < 0.05
    assert (own_shares(mixup=0.1, cutmix=0.0) - 0.5).abs().mean() > 0.3
    assert own_shares(mixup=0.0, cutmix=1e4).min() > 0.5  # half of an image, less at its border
    boxes = own_shares(mixup=0.0, cutmix_minmax=(0.25, 0.75))  # 2 to 5 of 8 pixels a side
    assert (boxes >= 39 / 64).all() and (boxes <= 60 / 64).all()
    torch.testing.assert_close(own_shares(), own_shares()[:, :1].expand(20, 6))
    pairs = own_shares(mode="pair")
    torch.testing.assert_close(pairs, pairs.flip(1))
    for apart in (pairs[:, :3], own_shares(mode="elem")):
        assert any(len(row.unique()) == len(row) for row in apart)


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
        (
            {"cutmix_minmax": [0.5, 0.5]},
            "cutmix_minmax must be two different values",
        ),
    ],
)
def test_bad_mixing(options, said):
    with pytest.raises(ValueError, match=said):
        Mixing(**options)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_boxes_without_a_side_are_refused_before_one_is_drawn(mode):
    """Of 8 pixels none is from 4 to less than 4: told at the first batch, whichever mixes it."""
    options = {"cutmix_minmax": [0.5, 0.6], "mode": mode}
    with pytest.raises(UserError, match=r"\[0.5, 0.6\] leaves no side of .* in 8 pixels"):
        collate(0, **options)
    collate(0, cutmix_minmax=[0.5, 0.625], switch_probability=1.0, mode=mode)
