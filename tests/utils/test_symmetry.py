"""The eight symmetries form the group they claim to."""

import pytest
import torch

from utils.symmetry import (
    SYMMETRIES,
    compose,
    disc,
    invert,
    rotate,
    transform_image,
    transform_map,
)


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


def test_quarter_turns_are_exact_and_counter_clockwise():
    images = torch.randn(1, 3, 9, 9)
    for quarters, name in enumerate(("e", "r", "rr", "rrr")):
        assert torch.equal(rotate(images, 90.0 * quarters), transform_image(images, name))
        nearly = rotate(images.double(), 90.0 * quarters + 0.01)
        inside = disc(9, 9, 1)
        error = (nearly - transform_image(images, name))[..., inside].abs().max()
        assert error < 0.01, "the interpolated part turns the same way"


def test_disc():
    cells = disc(4, 4)
    assert cells.sum() == 12 and not cells[0, 0] and cells[0, 1]
    assert disc(4, 4, 1).sum() == 4
    assert torch.equal(cells, cells.rot90())


def test_half_precision_is_turned_as_exactly_as_it_can_be_written():
    images = torch.rand(1, 3, 65, 65).bfloat16()
    assert torch.equal(rotate(images, 30.0), rotate(images.float(), 30.0).bfloat16())
