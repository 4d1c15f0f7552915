"""The format of float32 products is for a while another, however it was chosen."""

import pytest
import torch

from utils.precision import float32_products_in

LEGACY, NEWER = torch.set_float32_matmul_precision, torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _as_before():
    before = NEWER.fp32_precision
    yield
    LEGACY("highest")
    NEWER.fp32_precision = before


@pytest.mark.parametrize("told", ["highest", "high", "medium"])
def test_the_older_setting_comes_back(told):
    LEGACY(told)
    with float32_products_in("highest"):
        assert NEWER.fp32_precision == "ieee"
    assert torch.get_float32_matmul_precision() == told


@pytest.mark.parametrize("told", ["ieee", "tf32"])
def test_the_newer_setting_comes_back(told):
    """After which torch may refuse to read the older one."""
    NEWER.fp32_precision = told
    with pytest.raises(KeyError), float32_products_in("high"):
        assert NEWER.fp32_precision == "tf32"
        raise KeyError
    assert NEWER.fp32_precision == told
