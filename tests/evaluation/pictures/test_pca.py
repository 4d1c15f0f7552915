"""PCA maps: the same whatever the features' basis, as scikit-learn's, and capi's artefacts."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from evaluation.pictures.figures import visible
from evaluation.pictures.pca import draw_pca_maps, patch_maps, pca_colours, principal_scores
from evaluation.pictures.published_pca import (
    flips,
    joint_components,
    separate_components,
    to_rgb,
    write_published_pca,
)
from tests.evaluation.backbones import any_backbone, make
from tests.evaluation.toys import ToyNet
from utils.errors import UserError
from vit.adapters import timm_backbone


def test_colours_ignore_sign_and_rotation_of_features():
    """The same map whichever orthogonal basis the features are told in."""
    patches = torch.randn(3, 4, 4, 10) ** 3  # skewed, so that the sign is defined
    basis = torch.linalg.qr(torch.randn(10, 10)).Q
    colours = pca_colours(patches)
    assert colours.shape == (3, 4, 4, 3)
    torch.testing.assert_close(pca_colours(-patches @ basis), colours, atol=1e-3, rtol=0)


def test_constant_features_give_finite_colours():
    assert pca_colours(torch.ones(1, 2, 2, 5)).isfinite().all()
    assert separate_components(torch.ones(1, 2, 2, 5)).isfinite().all()


@pytest.mark.parametrize("whiten", [True, False])
def test_scores_are_scikit_learns_up_to_sign(whiten):
    rows = torch.randn(50, 8) * torch.arange(1, 9)
    theirs = PCA(4, whiten=whiten).fit_transform(rows.double().numpy())
    ours = principal_scores(rows, 4, whiten=whiten).numpy()
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-8)


def test_visible_undoes_the_normalisation():
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image = torch.rand(2, 8, 8, 3)
    torch.testing.assert_close(visible(((image - mean) / std).movedim(-1, 1)), image)


@any_backbone
def test_maps_are_drawn(backbone, tmp_path):
    path = draw_pca_maps(make(backbone), torch.randn(2, 3, 32, 32), tmp_path / "new" / "maps.png")
    with Image.open(path) as picture:
        assert picture.width > picture.height > 100


def test_a_net_that_crops_has_a_map():
    class Middle(ToyNet):
        def features(self, images, layers=(-1,)):
            found = super().features(images, layers)
            return [part._replace(patches=part.patches[:, 1:-1, 1:-1]) for part in found]

    assert patch_maps(Middle(), torch.randn(2, 3, 16, 16)).shape == (2, 2, 2, 6)


def test_maps_of_an_equivariant_net_turn_with_the_image():
    net = make(
        {
            "_target_": "octic.models.d8_inv_early_dinov2_vit_small_patch16",
            **{"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
        }
    ).double()
    images = torch.randn(2, 3, 32, 32).double()
    maps, turned = patch_maps(net, images), patch_maps(net, images.rot90(1, dims=(2, 3)))
    torch.testing.assert_close(turned.rot90(-1, dims=(1, 2)), maps)


def test_published_form(tmp_path):
    """Joint components have deviation 1 where the first has, one picture of each kind per image."""
    features = torch.randn(2, 4, 4, 12)
    separate, joint = separate_components(features), joint_components(features)
    assert separate.shape == (2, 4, 4, 6) and joint.shape == (2, 4, 4, 10)
    torch.testing.assert_close(
        joint.flatten(0, 2).std(dim=0, correction=0), torch.ones(10, dtype=torch.float64)
    )
    eight = list(flips(separate[0]))
    assert len({picture.tobytes() for picture in eight}) == 8
    assert (eight[7] == to_rgb(separate[0, ..., :3])).all(), "the last choice flips nothing"
    paths = write_published_pca(torch.randn(2, 3, 8, 8), features, tmp_path, names=[0, 30])
    assert [path.name for path in paths] == [
        f"{name}_pca_{kind}.png" for name in ("0000000", "0000030") for kind in ("sep", "joint")
    ]
    with Image.open(paths[1]) as row:
        assert row.size == (12 * 234, 234)
    assert (tmp_path / "artifacts" / "0000030_pca_jointall_flips_7.png").is_file()
    with Image.open(tmp_path / "artifacts" / "0000030_pca_sep.unwrapped_0_1.png") as cell:
        assert cell.size == (224, 224)


def test_few_channels_give_fewer_components():
    assert separate_components(torch.randn(1, 2, 2, 4)).shape == (1, 2, 2, 4)


def test_nets_without_maps_are_refused():
    with pytest.raises(UserError, match="three channels and three patches"):
        patch_maps(ToyNet(), torch.randn(1, 3, 4, 4))
    net = timm_backbone("resnet18")
    net.features = lambda images: [type("F", (), {"cls": images, "patches": None})()]
    with pytest.raises(UserError, match="TimmBackbone gives no patch tokens"):
        patch_maps(net, torch.randn(1, 3, 32, 32))
