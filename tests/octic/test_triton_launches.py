"""Every launch of a Triton kernel as the operators make it, compiled for GPUs that are not here."""

import importlib.util
import platform
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.octic.kernel_cases import SEGMENTS, TRANSFORMS, matrix_sources, plan_of

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is missing"),
    pytest.mark.skipif(platform.system() != "Linux", reason="Triton's assembler is for Linux"),
]
OCTIC, D4 = SEGMENTS["octic"], TRANSFORMS["D4"]
LINES, ROWS = 4, 2  # of the octic group: one-dimensional irreps, rows of the two-dimensional one
HALF = torch.bfloat16
# KiB of shared memory that a program may take: T4, A100, RTX 4090, H100, B200, RTX 5090.
SHARED = {75: 64, 80: 163, 89: 99, 90: 227, 100: 227, 120: 99}


class Elsewhere:
    """What Triton asks a driver before it compiles a launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton remembers what is compiled by device.

    def get_current_stream(self, _: int) -> int:
        return 0


@pytest.fixture
def launched(monkeypatch, tmp_path) -> Callable:
    """Function of a capability and a call: its kernels, compiled and not run."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found = []

    def getitem(kernel, grid):
        def run(*arguments, **options) -> None:
            # Without it Triton 3.9 warns, and 3.10 no longer fuses multiplications and additions.
            assert options["enable_fp_fusion"]
            found.append(kernel.run(*arguments, grid=grid, warmup=True, **options))

        return run

    def launch(capability: int, call: Callable) -> list:
        monkeypatch.setattr(driver, "_active", Elsewhere(capability))
        found.clear()
        call()
        return list(found)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "__getitem__", getitem)
    return launch


def features(channels: int, dtype: torch.dtype, tokens: int) -> Tensor:
    return torch.zeros(tokens, (LINES + 2 * ROWS) * channels, dtype=dtype)


def norms(channels: int, *, given: bool, tokens: int = 5) -> Iterator[Callable]:
    """given: with all that may be left out."""
    from octic import triton_norm

    x, branch = features(channels, torch.float32, tokens), features(channels, HALF, tokens)
    scales = tuple(torch.zeros(length * channels) for length, _ in OCTIC) if given else ()
    shift, bias = (torch.zeros(channels), branch[0, :channels]) if given else (None, None)
    past, cast = (x, HALF) if given else (None, None)
    factors = x[:, :1].clone() if given else None
    affine = (scales, shift, *plan_of(OCTIC), 1e-5)
    yield lambda: triton_norm.forward(x, None, None, None, *affine, HALF)
    yield lambda: triton_norm.forward(x, branch, bias, factors, *affine, HALF)
    yield lambda: triton_norm.backward(x, branch, past, factors, cast, *affine)


def others(channels: int, *, given: bool, tokens: int = 5) -> Iterator[Callable]:
    """The launches of the other kernels; given: with all that may be left out."""
    from octic import triton_bias, triton_gelu, triton_heads, triton_linear, triton_weights

    x, wide = features(channels, HALF, tokens), features(3 * channels, HALF, tokens)
    bias = wide[0, : 3 * channels].clone() if given else None
    yield lambda: triton_gelu.forward(wide, bias, D4)
    yield lambda: triton_gelu.backward(wide, bias, wide, D4)
    yield lambda: triton_bias.add(wide, wide[0, : 3 * channels].clone())
    widths = (channels,) * LINES + (2 * channels,) * ROWS
    for parts in (1, 3):
        own = wide[None, :, : parts * x.shape[1]].contiguous()
        yield lambda own=own, parts=parts: triton_heads.split(own, bias, 1, widths, parts)
        yield lambda p=parts: triton_heads.join([x[None, :, None]] * p, widths)
    lines, plane = torch.zeros(LINES, 3 * channels, channels), None
    if given:
        plane = torch.zeros(6 * channels, 2 * channels)
    else:
        x, wide = (t[:, : LINES * t.shape[1] // 8].contiguous() for t in (x, wide))
    for dtype in (HALF, torch.float32):
        own = [None if t is None else t.to(dtype) for t in (x, wide, lines, plane, bias)]
        yield lambda own=own: triton_linear.forward(own[0], *own[2:])
        yield lambda own=own: triton_linear.backward_input(own[1], *own[2:4])
        yield lambda own=own: triton_weights.backward(own[1], own[0], *own[2:4])


def matrices_made_and_back(channels: int, *, given: bool) -> Iterator[Callable]:
    from octic import matrices, triton_matrices

    layers = [
        matrix_sources(scaled=scaled, biased=given, given=channels, wanted=3 * channels)
        for scaled in ((False, True) if given else (False,))
    ]
    pairs = [(matrices.plain_stack(layer, HALF), layer) for layer in layers]
    yield lambda: triton_matrices.stack(layers, HALF)
    yield lambda: triton_matrices.unstack(pairs)


@pytest.mark.parametrize("given", [True, False])
def test_norms_compile_with_and_without_scale_and_shift(given, launched):
    for call in norms(5, given=given):
        assert launched(90, call)


@pytest.mark.slow
@pytest.mark.parametrize(
    "channels, given, capability",
    [
        *((5, False, 90), (48, True, 80), (48, True, 90)),
        *((channels, True, capability) for channels in (128, 1280) for capability in SHARED),
    ],
)
def test_every_launch_compiles_and_fits_into_shared_memory(channels, given, capability, launched):
    kinds = (norms,) if channels > 128 else (norms, others, matrices_made_and_back)
    for call in (call for kind in kinds for call in kind(channels, given=given)):
        kernels = launched(capability, call)
        assert kernels
        for kernel in kernels:
            assert kernel.asm["cubin"]
            assert kernel.metadata.shared <= 1024 * SHARED[capability], kernel.metadata.name


def test_no_grid_is_larger_than_cuda_takes(monkeypatch):
    """Of 2^24 tokens, which narrow nets have at large batches."""
    from triton.runtime.jit import JITFunction

    from octic import triton_norm, triton_weights

    grids = []
    monkeypatch.setattr(
        JITFunction, "__getitem__", lambda _, grid: lambda *a, **k: grids.append(grid)
    )
    for module in (triton_norm, triton_weights):
        monkeypatch.setattr(module, "processors", lambda device: 132)
    with torch.device("meta"):
        for kind in (norms, others):
            for call in kind(8, given=True, tokens=2**24):
                call()
    assert len(grids) > 10
    for first, *rest in grids:
        assert first < 2**31 and all(size < 2**16 for size in rest)
