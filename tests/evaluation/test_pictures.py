"""Pictures are written, and the maps in them turn with an equivariant net."""

import torch
from PIL import Image

from evaluation.pictures import draw_neighbours, draw_pca_maps, pca_colours, visible
from tests.evaluation.toys import ToyImages, ToyNet, to_tensor


def test_colours_ignore_sign_and_rotation_of_features():
    """The same map whichever orthogonal basis the features are told in."""
    patches = torch.randn(3, 4, 4, 10) ** 3  # skewed, so that the sign is defined
    basis = torch.linalg.qr(torch.randn(10, 10)).Q
    colours = pca_colours(patches)
    assert colours.shape == (3, 4, 4, 3)
    torch.testing.assert_close(pca_colours(-patches @ basis), colours, atol=1e-3, rtol=0)


def test_constant_features_give_finite_colours():
    assert pca_colours(torch.ones(1, 2, 2, 5)).isfinite().all()


def test_visible_undoes_the_normalisation():
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image = torch.rand(2, 8, 8, 3)
    torch.testing.assert_close(visible(((image - mean) / std).movedim(-1, 1)), image)


def test_maps_are_drawn(tmp_path):
    path = draw_pca_maps(ToyNet(), torch.randn(2, 3, 8, 8), tmp_path / "new" / "maps.png")
    with Image.open(path) as picture:
        assert picture.width > picture.height > 100


def test_neighbours_are_drawn(tmp_path):
    path = draw_neighbours(
        ToyNet(),
        ToyImages(30, 0),
        ToyImages(9, 1),
        tmp_path / "neighbours.png",
        transform=to_tensor,
        num_queries=3,
        k=4,
    )
    with Image.open(path) as picture:
        assert min(picture.size) > 100
