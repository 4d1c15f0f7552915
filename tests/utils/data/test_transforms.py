"""The probes' transforms: shapes for any image, and picklable for workers."""

import pickle

import pytest
import torch
from PIL import Image

from utils.data.transforms import ToTensor, evaluation_transform, training_transform


@pytest.mark.parametrize("size", [(300, 400), (100, 90), (224, 224), (20, 900)])
def test_every_image_becomes_one_size(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (255, 0, 0))
    for transform in (evaluation_transform(), training_transform()):
        result = pickle.loads(pickle.dumps(transform))(image)
        assert (type(result), result.shape, result.dtype) == (
            torch.Tensor,
            (3, 224, 224),
            torch.float32,
        )


def test_constants() -> None:
    white = Image.new("RGB", (32, 32), (255, 255, 255))
    result = evaluation_transform(resize_size=32, crop_size=32, mean=(0.5,) * 3, std=(0.25,) * 3)(
        white
    )
    assert torch.equal(result, torch.full((3, 32, 32), 2.0))


def test_a_tensor_passes_as_it_is() -> None:
    tensor = torch.arange(3, dtype=torch.uint8).view(3, 1, 1)
    assert ToTensor()(tensor) is tensor


def test_mirroring_can_be_switched_off_and_on() -> None:
    image = Image.linear_gradient("L").rotate(90).convert("RGB")
    kept, turned = (
        training_transform(crop_size=64, scale=(1, 1), hflip_probability=p)(image) for p in (0, 1)
    )
    assert torch.equal(kept.flip(-1).sign(), turned.sign())


def test_an_unknown_interpolation_is_refused() -> None:
    with pytest.raises(ValueError, match="cubic spline"):
        evaluation_transform(interpolation="cubic spline")
