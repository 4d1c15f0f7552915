"""The Triton kernels where there is no GPU: in the interpreter, compiled for one, and left out."""

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.octic.kernel_cases import SEGMENTS, TRANSFORMS, plan_of

ROOT = Path(__file__).parents[2]
OCTIC, D4 = SEGMENTS["octic"], TRANSFORMS["D4"]
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
from octic import irrep_norm, operators
assert not operators.HAS_TRITON
segments = ((1, 1.0), (1, 1.0))
print(irrep_norm.irrep_norm(torch.ones(2, 4), segments=segments).shape)
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@needs_triton
def test_triton_kernels_equal_the_plain_twins_in_the_interpreter():
    result = run_python(
        *("-m", "pytest", "-q", "-x", "tests/octic/triton_interpreter.py"), TRITON_INTERPRET="1"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout


def _kernels_and_arguments(channels):
    """Every Triton kernel with its compile-time arguments for C = `channels`, the octic group."""
    from octic import (
        triton_bias,
        triton_gelu,
        triton_heads,
        triton_linear,
        triton_matrices,
        triton_norm,
        triton_weights,
    )

    plan = plan_of(OCTIC)
    norm = triton_norm.options(8 * channels, *plan) | {"SCALE": True, "SHIFT": True}
    for given in (False, True):
        yield triton_norm.forward_kernel, norm | {"BRANCH": given, "BIAS": given}
        yield triton_norm.backward_kernel, norm | {"PAST": given, "BRANCH": given}
    yield triton_norm.sum_kernel, {"WIDTH": 9 * channels, "BLOCK_P": 64, "BLOCK_W": 32}
    gelu = triton_gelu.options(channels, D4) | {"BIAS": True}
    yield triton_gelu.forward_kernel, gelu
    yield triton_gelu.backward_kernel, gelu
    for parts in (1, 3):
        width = channels * 8
        widths = (channels,) * 4 + (2 * channels,) * 2
        split = triton_heads.options(1, widths, parts, width)
        yield triton_heads.split_kernel, split | {"BIASED": channels * (parts > 1)}
        yield triton_heads.join_kernel, triton_heads.options(1, widths, parts, parts * width)
    shapes = (4, 4 * channels, channels), (8 * channels, 2 * channels), 2
    for transposed in (False, True):
        linear = triton_linear.options(*shapes, transposed=transposed)
        yield (
            triton_linear.product_kernel,
            linear | {"BIAS": not transposed, "PRECISION": "ieee"},
        )
    share, _ = triton_weights.options(*shapes, half=True)
    yield triton_weights.share_kernel, share | {"PRECISION": "tf32"}
    layers = tuple(
        triton_matrices.Shape(4, (size,) * 4 + (tuple(2 * n for n in size),), True, scaled)
        for size, scaled in (((3 * channels, channels), False), ((channels, channels), True))
    )
    jobs, _ = triton_matrices.stack_jobs(layers)
    yield triton_matrices.stack_kernel, {"JOBS": jobs, "BLOCK": triton_matrices.BLOCK}
    jobs, _ = triton_matrices.unstack_jobs(layers)
    yield triton_matrices.unstack_kernel, {"JOBS": jobs, "BLOCK_R": 8, "BLOCK_C": 128}
    sizes = {"LINE_VALUES": 320, "PLANE_VALUES": 64, "BIAS_VALUES": 8, "BLOCK": 512}
    yield triton_weights.add_kernel, sizes
    blocks = {"BLOCK_R": 8, "BLOCK_C": 256}
    yield triton_bias.add_kernel, {"WIDTH": 8 * channels, "C": channels} | blocks


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(platform.system() != "Linux", reason="Triton's assembler is for Linux")
@pytest.mark.parametrize("channels", [48, 5, 128])
def test_triton_kernels_compile_for_a_gpu_that_is_not_here(channels, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"rows": "i32", "span": "i32", "shares": "i32", "programs": "i32", "eps": "fp32"}
    types |= dict.fromkeys(("shift_ptr", "total_ptr", "past_ptr", "sums_ptr"), "*fp32")
    types["scale_ptrs"] = ("*fp32",) * len(OCTIC)
    counts = {"source": 12, "weight": 10, "dweight": 10, "bias": 3, "dbias": 3}
    counts |= {"factor": 6, "dfactor": 6}
    types |= {f"{name}_ptrs": ("*fp32",) * count for name, count in counts.items()}
    types |= {name: ("*bf16",) * 6 for name in ("out_ptrs", "grad_ptrs")}
    kernels = list(_kernels_and_arguments(channels))
    for kernel, arguments in kernels:
        constants = {name: value for name, value in arguments.items() if name in kernel.arg_names}
        signature = {
            name: "constexpr" if name in constants else types.get(name, "*bf16")
            for name in kernel.arg_names
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        options = {name: v for name, v in arguments.items() if name not in kernel.arg_names}
        for capability in (80, 90):
            target = GPUTarget("cuda", capability, 32)
            compiled = triton.compile(source, target=target, options=options)
            assert compiled.asm["cubin"]
            assert compiled.metadata.shared <= 99 * 1024, "what every such GPU has"


@needs_triton
@pytest.mark.parametrize("width", [512, 1280, 4096, 8192, 10240])
def test_a_norm_loads_ahead_only_what_shared_memory_holds(width):
    """Three float32 tensors of a row, twice: an H200 refused rows of 10,240 channels."""
    from octic import triton_norm

    plan = plan_of(OCTIC)
    chosen = triton_norm.options(width, *plan)
    row = 8 * chosen["BLOCK_C"] * 4
    assert 3 * row * (chosen["AHEAD"] - 1) <= 99 * 1024


# Kernels that an operator launches on a GPU: the one-dimensional irreps, the two-dimensional one.
LAUNCHES = {"octic.irrep_linear.default": 2}
VIEWS = ("view", "transpose", "getitem", "detach", "alias", "slice", "select", "expand")


@needs_triton
@pytest.mark.parametrize("scaled", [True, False])
def test_the_forward_pass_of_a_block_is_fifteen_launches_on_a_gpu(scaled, monkeypatch):
    """By the operators that run on CUDA tensors without data, attention counted as one."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    from octic.block import OcticBlock
    from vit.block import Addend

    monkeypatch.setattr("octic.layers.attend", lambda q, k, v, *_, **__: q.clone())

    def forward(x, addend):
        x, addend = block(x, None, Addend(addend), True)
        return x, *addend

    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        block = OcticBlock(512, num_heads=8, init_values=1e-5 if scaled else None)
        x = torch.randn(2, 257, 512)
        graph = make_fx(forward)(x, x)
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    run = [name for name in names if not any(view in name for view in VIEWS)]
    assert sum(LAUNCHES.get(name, 1) for name in run) == 15, "\n".join(run)
