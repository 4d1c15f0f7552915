"""The published, interpolated convolutions: their law, and the places that a file brings along."""

import pytest
import torch

from tests.parity.gevit_published_gcnn import (
    PublishedGCNN,
    PublishedGroupConv,
    PublishedLiftingConv,
    published_kernels,
)


def published_layout(module):
    """The state of a module as a published file spells it."""
    found = {}
    for name, tensor in module.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        prefix = f"{owner}.kernel." if owner else "kernel."
        if leaf == "places":
            over_group = tensor.shape[-1] == 3
            leaf = "transformed_grid_R2xH" if over_group else "transformed_grid_R2"
            tensor = tensor.roll(-1, dims=-1).movedim(-1, 0)
        found[f"{prefix}{leaf}"] = tensor.clone()
        found[f"{prefix}grid_R2"] = torch.zeros(2, 3, 3)
        found[f"{prefix}group.identity"] = torch.zeros(1)
    return found


def test_rotations_of_the_image_rotate_the_map_and_shift_the_group():
    lift = PublishedLiftingConv(2, 3, 3).double()
    conv = PublishedGroupConv(3, 2, 3).double()
    images = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    y, turned = (conv(lift(x)) for x in (images, images.rot90(1, (-2, -1))))
    torch.testing.assert_close(turned, y.rot90(1, (-2, -1)).roll(1, dims=2))


@pytest.mark.parametrize("mirrors", [False, True])
def test_places_of_a_file_are_taken_over(mirrors):
    options = {"hidden_channels": 2, "kernel_size": [5, 3], "order": 3, "mirrors": mirrors}
    stem = PublishedGCNN(1, **options).double()
    with torch.no_grad():
        stem.lifting_conv.places.mul_(0.9)
        stem.gconvs[0].places.add_(0.05)
    images = torch.randn(1, 1, 14, 14, dtype=torch.float64)
    loaded = PublishedGCNN(1, **options).double()
    assert not torch.equal(loaded(images), stem(images))
    loaded.load_state_dict(published_kernels(published_layout(stem)), strict=True)
    assert torch.equal(loaded(images), stem(images))


def test_unknown_names_of_a_file_are_refused():
    conv = PublishedLiftingConv(2, 3, 3)
    state = published_kernels({**published_layout(conv), "final_linear.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="final_linear"):
        conv.load_state_dict(state, strict=True)


def test_mirrored_kernels_are_left_right_mirror_images():
    """Of a mirrored image the maps are mirrored, and the two elements change places."""
    lift = PublishedLiftingConv(2, 3, 3, order=1, mirrors=True).double()
    images = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(lift(images.flip(-1)), lift(images).flip((2, -1)))
