"""Any angle: quarter turns are exact, the direction is that of the symmetries, controls measure."""

import pytest
import torch

from evaluation.symmetry.angles import angle_errors, angles_of
from octic.vision_transformer import OcticVisionTransformer
from tests.evaluation.backbones import any_backbone, make
from tests.evaluation.symmetry.test_equivariance import SIZES, shaken
from utils.errors import UserError


def test_angles_of():
    assert angles_of(15.0) == [15.0 * index for index in range(24)]
    assert angles_of(50) == [0, 50, 100, 150, 200, 250, 300, 350]
    assert angles_of(0) == []
    with pytest.raises(UserError, match=r"angle_step must lie in \[0, 180\], not -5"):
        angles_of(-5)


def test_an_invariant_net_errs_between_the_quarter_turns_alone():
    net = shaken(OcticVisionTransformer(**SIZES, invariant=True))
    errors = angle_errors(net, torch.randn(2, 3, 16, 16).double(), [0, 30, 90, 180, 315])
    for angle in (0, 90, 180):
        assert max(errors[angle]) < 1e-10
    for angle in (30, 315):
        assert min(errors[angle]) > 1e-3


@any_backbone
def test_any_net(backbone):
    """A quarter turn there and back changes nothing; what it does itself is the net's error."""
    errors = angle_errors(make(backbone), torch.randn(1, 3, 32, 32), [45.0, 90.0])
    assert errors[90.0].cls > 1e-4 and errors[90.0].patches > 1e-2
    assert errors[90.0].cls_control < 1e-6 and errors[90.0].patches_control < 1e-6
    assert errors[45.0].cls_control > 1e-5


def test_patches_that_leave_nothing_to_compare_have_no_error():
    net = OcticVisionTransformer(**{**SIZES, "patch_size": 8})
    error = angle_errors(net, torch.randn(1, 3, 16, 16), [30.0])[30.0]
    assert error.patches is None and error.patches_control is None and error.cls > 0
