"""Number formats: a warning where one is slow, and float32 products in another for a while."""

import pytest
import torch

from utils.precision import Precision, float32_products_in

LEGACY, NEWER = torch.set_float32_matmul_precision, torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _as_before():
    before = NEWER.fp32_precision
    yield
    LEGACY("highest")
    NEWER.fp32_precision = before


def test_half_precision_on_a_cpu_is_no_silent_wait():
    (note,) = Precision("fp16", "cpu").notes()
    assert note.startswith("training.precision=fp16 is for GPUs")
    assert not Precision("auto", "cpu").notes() and not Precision("bf16", "cpu").notes()


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
