"""The peak arithmetic rate of a device, which utilisation (MFU) refers to."""

import platform
import re
import time
from pathlib import Path
from typing import NamedTuple

import torch

# Dense FLOP/s x 10^12 of matrix products by NVIDIA's data sheets, of the SXM version unless the
# name says otherwise, without the sparsity that the sheets' larger figures assume. "tf32": float32
# in and out. Formats that a device lacks are left out here and measured instead. The first pattern
# found in the device's name counts; cards with similar names (Ti, D, V100S) are different ones.
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"\bB200\b", {"bf16": 2250.0, "fp16": 2250.0, "tf32": 1125.0}),
    (r"\bH200 NVL\b", {"bf16": 835.0, "fp16": 835.0, "tf32": 417.0}),
    (r"\b(H200|GH200)\b", {"bf16": 989.0, "fp16": 989.0, "tf32": 494.0}),
    (r"\bH100 NVL\b", {"bf16": 835.0, "fp16": 835.0, "tf32": 417.0}),
    (r"\bH100 PCIe\b", {"bf16": 756.0, "fp16": 756.0, "tf32": 378.0}),
    (r"\bH100\b", {"bf16": 989.0, "fp16": 989.0, "tf32": 494.0}),
    (r"\bA100\b", {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0}),
    (r"\bL40S\b", {"bf16": 362.0, "fp16": 362.0, "tf32": 183.0}),
    (r"\bL4\b", {"bf16": 121.0, "fp16": 121.0, "tf32": 60.0}),
    (r"\bA40\b", {"bf16": 149.7, "fp16": 149.7, "tf32": 74.8}),
    (r"\bA10\b", {"bf16": 125.0, "fp16": 125.0, "tf32": 62.5}),
    (r"\bRTX A6000\b", {"bf16": 154.8, "fp16": 154.8, "tf32": 77.4}),
    (r"\bRTX 4090$", {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6}),
    (r"\bRTX 3090$", {"bf16": 71.0, "fp16": 71.0, "tf32": 35.6}),
    (r"\bV100-PCIE\b", {"fp16": 112.0, "fp32": 14.0}),
    (r"\bV100\b", {"fp16": 125.0, "fp32": 15.7}),
    (r"\bT4\b", {"fp16": 65.0, "fp32": 8.1}),
)
_SLICE = re.compile(r"\bMIG\b")  # the name of a slice begins with that of the whole card
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Peak(NamedTuple):
    """Floating-point operations per second, and where the figure is from."""

    flops: float
    source: str


def find_peak(device: torch.device, arithmetic: str) -> Peak:
    """The device's peak in `arithmetic` (bf16, fp16, tf32 or fp32): known, or else measured."""
    return known_peak(device_name(device), arithmetic) or measure_peak(device, arithmetic)


def known_peak(name: str, arithmetic: str) -> Peak | None:
    """The data sheet's peak of a device, found by its name; None if it is not known."""
    if _SLICE.search(name):
        return None
    for pattern, peaks in _PEAKS:
        if re.search(pattern, name):
            peak = peaks.get(arithmetic)
            source = f"data sheet of {name}, {arithmetic}, dense"
            return None if peak is None else Peak(peak * 1e12, source)
    return None


def measure_peak(
    device: torch.device, arithmetic: str, *, size: int | None = None, budget_s: float = 3.0
) -> Peak:
    """Measure the best rate of a large square matrix product on `device`, in at least two tries."""
    size = size or (1024 if device.type == "cpu" else 8192)
    dtype = _DTYPES.get(arithmetic, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < budget_s:
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    source = f"best rate of a product of two {size} x {size} matrices here, {arithmetic}"
    return Peak(2 * size**3 / min(seconds), source)


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are fast; a CPU without them is a hundred times slower."""
    if device.type != "cpu":
        return True
    half, full = (measure_peak(device, a, size=256, budget_s=0.05) for a in ("bf16", "fp32"))
    return half.flops > full.flops / 4


def arithmetic_of(device: torch.device, dtype: torch.dtype | None) -> str:
    """The format of matrix products: that of the autocast, else the device's float32."""
    if dtype is not None:
        return next(name for name, known in _DTYPES.items() if known is dtype)
    tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    # torch.get_float32_matmul_precision() raises if this setting was used.
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tensor_cores and tf32 else "fp32"


def device_name(device: torch.device) -> str:
    """The maker's name of the device; of a CPU its model, where Linux tells it, or architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return _processor()


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()
