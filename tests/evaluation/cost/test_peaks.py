"""The peak that MFU is a share of: of the data sheet where the device is known, else measured."""

import pytest
import torch

from evaluation.cost import peaks
from evaluation.cost.peaks import arithmetic_of, find_peak, has_bfloat16, known_peak, measure_peak

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "arithmetic", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "tf32", 156),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA A40", "bf16", 149.7),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla T4", "fp16", 65),
    ],
)
def test_known_devices(name, arithmetic, tera):
    peak = known_peak(name, arithmetic)
    assert peak.flops == pytest.approx(tera * 1e12)
    assert peak.source == f"data sheet of {name}, {arithmetic}, dense"


@pytest.mark.parametrize(
    ("name", "arithmetic"),
    [
        ("NVIDIA A10G", "bf16"),
        ("NVIDIA L40", "bf16"),
        ("Tesla V100-SXM2-32GB", "bf16"),
        ("Tesla V100S-PCIE-32GB", "fp16"),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16"),
        ("NVIDIA GeForce RTX 4090 D", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "bf16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "tf32"),
        ("", "fp32"),
    ],
)
def test_what_is_not_known_is_not_guessed(name, arithmetic):
    assert known_peak(name, arithmetic) is None


def test_a_cpu_is_measured_and_says_so():
    peak = find_peak(CPU, arithmetic_of(CPU, None))
    assert peak.flops > 1e8
    assert peak.source == "best rate of a product of two 1024 x 1024 matrices here, fp32"
    assert measure_peak(CPU, "fp32", size=64, budget_s=0).flops > 0


def test_formats():
    assert arithmetic_of(CPU, torch.bfloat16) == "bf16"
    assert arithmetic_of(torch.device("meta"), None) == "fp32"


@pytest.mark.parametrize(("rate", "has"), [(1e12, True), (1e9, False)])
def test_bfloat16_that_is_only_imitated_is_found_out(rate, has, monkeypatch):
    rates = {"bf16": rate, "fp32": 1e12}
    monkeypatch.setattr(peaks, "measure_peak", lambda d, a, **_: peaks.Peak(rates[a], ""))
    assert has_bfloat16(CPU) is has
