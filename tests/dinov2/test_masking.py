"""Masks keep to their targets, are reproducible, and batches have shapes that never change."""

import random

import pytest
import torch

from dinov2.masking import Collate, MaskSampler, block_mask, mask_weights


@pytest.mark.parametrize("grid", [(4, 4), (14, 14), (7, 10), (2, 2), (1, 5)])
def test_a_mask_never_exceeds_its_target(grid):
    rng = random.Random(0)
    for target in (0, 1, 3, grid[0] * grid[1] // 2):
        for _ in range(50):
            mask = block_mask(grid, target, rng)
            assert mask.shape == grid
            assert int(mask.sum()) <= target


def test_the_same_generator_gives_the_same_masks():
    sampler = MaskSampler()
    first, again, other = (
        sampler.sample(8, (6, 6), torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("size", "patch"), [(224, 16), (224, 14), (98, 14), (518, 14), (96, 32)])
def test_the_largest_block_is_the_published_one(size, patch):
    """DINOv2 says it in pixels, evaluated from left to right: it rounds odd grids down."""
    side, largest = size // patch, 0.5 * size // patch * size // patch
    for seed in range(20):
        target, same = int(0.5 * side * side), random.Random(seed)
        published = block_mask((side, side), target, random.Random(seed), max_block=largest)
        assert torch.equal(block_mask((side, side), target, same), published)


def test_half_of_the_images_are_masked_within_the_ratios():
    masks = MaskSampler().sample(20, (14, 14), torch.Generator().manual_seed(0))
    counts = masks.sum(dim=1)
    assert int((counts > 0).sum()) == 10
    assert int(counts.max()) <= 98
    assert int(counts.sum()) <= MaskSampler().upperbound(20, 196)


def test_every_place_in_a_batch_is_masked_alike():
    """The first crops of a batch are global crops 0: none may have more masks than the others."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack([MaskSampler().sample(4, (8, 8), generator) for _ in range(200)])
    masked = masks.any(dim=2).double().mean(dim=0)  # of each place, how often
    assert (masked - 0.5).abs().max() < 0.15
    cells = masks.double().mean(dim=(0, 2))  # and how much
    assert cells.max() < 1.3 * cells.min()


def test_weights_of_an_image_sum_to_one():
    masks = torch.rand(5, 12) < 0.4
    masks[2] = False
    sums = torch.zeros(5).index_add(0, masks.nonzero()[:, 0], mask_weights(masks))
    torch.testing.assert_close(sums, masks.any(dim=1).float())


def make_samples(num_local: int) -> list:
    return [
        (
            {
                "global_crops": torch.full((2, 3, 8, 8), float(image))
                + torch.tensor([0.0, 0.5]).view(2, 1, 1, 1)
            }
            | (
                {"local_crops": torch.full((num_local, 3, 4, 4), float(image))} if num_local else {}
            ),
            -1,
        )
        for image in range(3)
    ]


def test_crops_are_collated_crop_by_crop():
    batch = Collate(MaskSampler(), (2, 2))(make_samples(2), torch.Generator())
    assert batch["global_crops"][:, 0, 0, 0].tolist() == [0, 1, 2, 0.5, 1.5, 2.5]
    assert batch["local_crops"][:, 0, 0, 0].tolist() == [0, 1, 2, 0, 1, 2]
    assert batch["masks"].shape == (6, 4)


def test_no_local_crops_leave_no_key():
    assert "local_crops" not in Collate(MaskSampler(), (2, 2))(make_samples(0), torch.Generator())


def test_shapes_do_not_depend_on_the_draw():
    collate = Collate(MaskSampler(), (4, 4))
    generator = torch.Generator().manual_seed(0)
    batches = [collate(make_samples(1), generator) for _ in range(20)]
    assert len({tuple(tuple(v.shape) for v in batch.values()) for batch in batches}) == 1
    for batch in batches:
        count = int(batch["masks"].sum())
        assert batch["masks"].flatten()[batch["mask_indices"][:count]].all()
        assert not batch["mask_weights"][count:].any()


def test_a_share_outside_zero_to_one_is_refused():
    with pytest.raises(ValueError, match="sample_probability"):
        MaskSampler(sample_probability=1.5)
    with pytest.raises(ValueError, match="ratio_min_max"):
        MaskSampler(ratio_min_max=(0.5, 0.1))


def test_no_masks_at_all():
    batch = Collate(MaskSampler(sample_probability=0.0), (2, 2))(make_samples(1), torch.Generator())
    assert not batch["masks"].any()
    assert batch["mask_indices"].shape == batch["mask_weights"].shape == (0,)
