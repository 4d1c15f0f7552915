"""Float32 on a real GPU is as exact as `utils.precision` says."""

import pytest
import torch
from torch.nn import functional as F

from utils.precision import Precision, float32_products_in

pytestmark = pytest.mark.gpu


def error_of_a_patch_embedding() -> float:
    generator = torch.Generator("cuda").manual_seed(0)
    images, filters = (
        torch.randn(shape, device="cuda", generator=generator)
        for shape in ((8, 3, 224, 224), (384, 3, 16, 16))
    )
    exact = F.conv2d(images.double(), filters.double(), stride=16)
    return float((F.conv2d(images, filters, stride=16) - exact).norm() / exact.norm())


def test_convolutions_are_exact_where_products_are():
    """TF32 errs by some 3e-4."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        Precision("bf16", "cuda")
        with float32_products_in("highest"):
            assert error_of_a_patch_embedding() < 1e-5
        Precision("fp32", "cuda")
        assert error_of_a_patch_embedding() < 1e-5
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
