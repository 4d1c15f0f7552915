"""The Triton kernels where there is no GPU: in the interpreter, counted, and left out."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octic import device
from octic.block import OcticBlock
from tests.octic.kernel_cases import SEGMENTS, plan_of
from vit.block import Addend

ROOT = Path(__file__).parents[2]
OCTIC = SEGMENTS["octic"]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed here"
)


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from octic import device, irrep_norm
assert not device.HAS_TRITON
segments = ((1, 1.0), (1, 1.0))
print(irrep_norm.irrep_norm(torch.ones(2, 4), segments=segments).shape)
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton starts here")
def test_blocks_run_where_triton_does_not_start(monkeypatch, recwarn):
    """As on a node without a C compiler; a line says so, once."""
    block, x = OcticBlock(64, num_heads=2, init_values=0.1), torch.randn(2, 5, 64)

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(block(x).sum(), list(block.parameters())))

    plain = gradients()
    device._triton_starts.cache_clear()
    for module in ("device", "block", "layers", "matrices"):
        monkeypatch.setattr(f"octic.{module}.takes_triton", lambda x: True)
    for _ in range(2):
        for ours, exact in zip(gradients(), plain, strict=True):
            torch.testing.assert_close(ours, exact)
    said = [str(warning.message) for warning in recwarn if "Triton" in str(warning.message)]
    assert len(said) == 1 and "slower: 0 active drivers" in said[0]


@pytest.mark.slow
@needs_triton
def test_triton_kernels_equal_the_plain_twins_in_the_interpreter():
    result = run_python(
        *("-m", "pytest", "-q", "-x", "tests/octic/triton_interpreter.py"), TRITON_INTERPRET="1"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout


@needs_triton
@pytest.mark.parametrize("width", [512, 1280, 2048, 4096, 8192, 10240])
def test_a_norm_loads_ahead_only_what_shared_memory_holds(width):
    """Three float32 tensors of a row and the shift's channels of one, twice.

    An H200 refused rows of 10,240 channels; cards of 8.6, 8.9 and 12.0 have 99 KiB, of which the
    compiled backward pass took 102,528 bytes at 4096 channels.
    """
    from octic import triton_norm

    plan = plan_of(OCTIC)
    chosen = triton_norm.options(width, *plan)
    row = 8 * chosen["BLOCK_C"] * 4
    assert (3 * row + row // 8) * (chosen["AHEAD"] - 1) <= 99 * 1024
    assert (chosen["AHEAD"] > 1) is (width <= 2048)


# Kernels that an operator launches on a GPU: the one-dimensional irreps, the two-dimensional one.
LAUNCHES = {"octic.irrep_linear.default": 2}
VIEWS = ("view", "transpose", "getitem", "detach", "alias", "slice", "select", "expand")


@needs_triton
@pytest.mark.parametrize("scaled", [True, False])
def test_the_forward_pass_of_a_block_is_fifteen_launches_on_a_gpu(scaled, monkeypatch):
    """By the operators that run on CUDA tensors without data, attention counted as one."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    monkeypatch.setattr("octic.attention.attend", lambda q, k, v, *_, **__: q.clone())

    def forward(x, addend):
        return block(x, None, Addend(addend), True)

    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        block = OcticBlock(512, num_heads=8, init_values=1e-5 if scaled else None)
        x = torch.randn(2, 257, 512)
        graph = make_fx(forward)(x, x)
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    run = [name for name in names if not any(view in name for view in VIEWS)]
    assert sum(LAUNCHES.get(name, 1) for name in run) == 15, "\n".join(run)
