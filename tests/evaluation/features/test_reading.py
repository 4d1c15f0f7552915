"""A net of the user's own that breaks the contract of features is told in one line."""

from pathlib import Path

import pytest
import torch

from evaluation.comparison.symmetry_pictures import draw_latent_maps
from evaluation.features.dataset import class_token
from evaluation.features.reading import features_of, patch_map, patch_tokens
from evaluation.probes.training import FrozenFeatures
from evaluation.symmetry.angles import angle_errors
from evaluation.symmetry.equivariance import logit_errors, measure
from tests.evaluation.toys import ToyNet
from utils.errors import UserError

IMAGES = torch.zeros(2, 3, 8, 8)


class Tuples(ToyNet):
    def features(self, images, layers=(-1,)):
        return [tuple(part) for part in super().features(images, layers)]


class TheLastOne(ToyNet):
    def features(self, images, layers=(-1,)):
        return super().features(images)


class ThreeBlocks(ToyNet):
    def features(self, images, layers=(-1,)):
        blocks = super().features(images) * 3
        return [blocks[layer] for layer in layers]


def test_features_are_those_of_the_net():
    net = ToyNet().eval()
    (found,) = features_of(net, IMAGES)
    assert found.cls.shape == (2, 6) and len(features_of(net, IMAGES, (-2, -1))) == 2


def test_the_last_block_alone_is_asked_without_layers():
    class Last(ToyNet):
        def features(self, images):
            return super().features(images)

    assert class_token(Last(), IMAGES).shape == (2, 6)


def test_plain_tuples_are_told():
    said = r"^Tuples.features returned tuple for blocks \[-1\].*vit.backbone.Features\(cls="
    with pytest.raises(UserError, match=said):
        class_token(Tuples(), IMAGES)
    with pytest.raises(UserError, match="returned Features for blocks .* list of as many"):
        features_of(TheLastOne(), IMAGES, (-2, -1))


@pytest.mark.parametrize(
    "look",
    [
        lambda net: angle_errors(net, IMAGES, [90]),
        lambda net: measure(net, IMAGES),
        lambda net: draw_latent_maps({"mine": net}, IMAGES[:1], Path("maps.png")),
    ],
)
def test_symmetry_and_its_pictures_tell_it_too(look):
    with pytest.raises(UserError, match=r"^Tuples.features returned tuple for blocks"):
        look(Tuples())


def test_a_net_that_gives_a_tuple_for_logits_is_told():
    class Twice(ToyNet):
        def forward(self, images):
            return images, images

    with pytest.raises(UserError, match="the net gives no logits"):
        logit_errors(Twice(), IMAGES)


def test_blocks_that_a_net_lacks_are_told():
    layers = (-4, -3, -2, -1)
    said = r"ThreeBlocks.features, asked for blocks \[-4, -3, -2, -1\]: .*n_last_blocks=\[1\]"
    with pytest.raises(UserError, match=said):
        FrozenFeatures(ThreeBlocks(), layers, "fp32")(IMAGES)
    assert len(features_of(ThreeBlocks(), IMAGES, layers[1:])) == 3


class NoPatches(ToyNet):
    def features(self, images, layers=(-1,)):
        return [part._replace(patches=None) for part in super().features(images, layers)]


class WrongGrid(ToyNet):
    def features(self, images, layers=(-1,)):
        found = super().features(images, layers)
        return [part._replace(patches=part.patches[:, 1:]) for part in found]


def test_patches_or_one_line():
    assert patch_tokens(ToyNet(), IMAGES).shape == (2, 2, 2, 6)
    with pytest.raises(UserError, match="^NoPatches gives no patch tokens"):
        patch_tokens(NoPatches(), IMAGES)
    said = r"WrongGrid gives patches of shape \[2, 1, 2, 6\] for .* 8 x 8 pixels, not \[2, 2, 2"
    with pytest.raises(UserError, match=said):
        patch_tokens(WrongGrid(), IMAGES)


class Rows(ToyNet):
    def features(self, images, layers=(-1,)):
        found = super().features(images, layers)
        return [part._replace(patches=part.patches.flatten(1, 2)) for part in found]


def test_a_map_may_be_of_any_size_but_is_a_map():
    assert patch_map(WrongGrid(), IMAGES).shape == (2, 1, 2, 6)
    with pytest.raises(UserError, match="^NoPatches gives no patch tokens"):
        patch_map(NoPatches(), IMAGES)
    with pytest.raises(UserError, match=r"^Rows gives patches of shape \[2, 4, 6\] for 2 images"):
        patch_map(Rows(), IMAGES)
