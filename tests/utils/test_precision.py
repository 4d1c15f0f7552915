"""Number formats: a warning where one is slow, and float32 products in another for a while."""

import pytest
import torch

from utils.precision import Precision, float32_products_in

LEGACY, NEWER = torch.set_float32_matmul_precision, torch.backends.cuda.matmul
CUDNN = torch.backends.cudnn


@pytest.fixture(autouse=True)
def _as_before():
    before = NEWER.fp32_precision
    yield
    LEGACY("highest")
    NEWER.fp32_precision = before
    CUDNN.allow_tf32 = True


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


@pytest.mark.parametrize(("has_units", "mode"), [(True, "bf16"), (False, "fp16")])
def test_auto_is_bf16_where_the_gpu_has_it(has_units, mode, monkeypatch):
    """A T4 emulates it, slowly."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_units)
    assert Precision("auto", "cuda").mode == mode


@pytest.mark.parametrize(("mode", "tf32"), [("fp32", False), ("tf32", True), ("bf16", True)])
def test_fp32_is_exact_in_convolutions_too(mode, tf32):
    """A patch embedding is one, and torch lets cuDNN take it in TF32 unless it is told not to."""
    for before in (True, False):
        CUDNN.allow_tf32 = before
        Precision(mode, "cuda")
        assert CUDNN.allow_tf32 is tf32 and (NEWER.fp32_precision == "tf32") is tf32


@pytest.mark.parametrize("told", [True, False])
def test_products_in_the_highest_format_have_exact_convolutions_beside_them(told):
    CUDNN.allow_tf32 = told
    with float32_products_in("highest"):
        assert CUDNN.allow_tf32 is False and CUDNN.conv.fp32_precision != "tf32"
    assert CUDNN.allow_tf32 is told
    with float32_products_in("high"):
        assert CUDNN.allow_tf32 is told


def test_a_format_of_convolutions_alone_comes_back():
    """After which torch refuses to read the older setting of all that cuDNN does."""
    CUDNN.conv.fp32_precision = "ieee"
    with float32_products_in("highest"):
        assert CUDNN.conv.fp32_precision != "tf32"
    assert (CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision) == ("ieee", "tf32")
    with pytest.raises(RuntimeError, match="mix of the legacy and new"):
        _ = CUDNN.allow_tf32
