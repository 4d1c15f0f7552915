"""The eight symmetries form the group they claim to."""

import pytest
import torch

from utils.symmetry import SYMMETRIES, compose, invert, transform_image, transform_map


@pytest.mark.parametrize("second", SYMMETRIES)
@pytest.mark.parametrize("first", SYMMETRIES)
def test_composition(first, second):
    image = torch.arange(9.0).view(3, 3)
    twice = transform_image(transform_image(image, first), second)
    assert torch.equal(twice, transform_image(image, compose(second, first)))


@pytest.mark.parametrize("element", SYMMETRIES)
def test_inverse(element):
    image = torch.randn(2, 3, 4, 5)
    assert torch.equal(transform_image(transform_image(image, element), invert(element)), image)
    assert compose(element, invert(element)) == "e"


def test_eight_different_images():
    image = torch.arange(9).view(3, 3)
    turned = {tuple(transform_image(image, element).flatten().tolist()) for element in SYMMETRIES}
    assert len(turned) == 8


def test_quarter_turn_is_counter_clockwise():
    image = torch.tensor([[1, 2], [3, 4]])
    assert transform_image(image, "r").tolist() == [[2, 4], [1, 3]]
    assert transform_image(image, "mr").tolist() == [[4, 2], [3, 1]]


def test_map_moves_patches_and_leaves_channels():
    patches = torch.randn(2, 3, 4, 5)
    moved = transform_map(patches, "r")
    assert moved.shape == (2, 4, 3, 5)
    assert torch.equal(moved[:, 0, 0], patches[:, 0, -1])


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="symmetry must be one of e, r, rr"):
        transform_image(torch.zeros(2, 2), "rm")
