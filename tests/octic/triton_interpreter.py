"""Triton kernels against their plain twins, in Triton's interpreter on a CPU.

`test_triton.py` runs this file in a process of its own: TRITON_INTERPRET=1 has to be set before
triton is imported.
"""

import itertools
import os
from contextlib import nullcontext

import pytest
import torch
from triton.runtime import interpreter

from octic import (
    irrep_linear,
    irrep_norm,
    matrices,
    plain_kernels,
    regular_gelu,
    triton_bias,
    triton_gelu,
    triton_heads,
    triton_linear,
    triton_matrices,
    triton_norm,
    triton_weights,
)
from tests.octic.kernel_cases import (
    SEGMENTS,
    TRANSFORMS,
    gelu_by_definition,
    gradients,
    matrix_sources,
    norm_by_definition,
    norm_inputs,
    norm_of,
    parted,
    plan_of,
    relative_error,
)

assert os.environ.get("TRITON_INTERPRET") == "1"
# One rounding of a result of the largest magnitude; the interpreter truncates to bfloat16.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}


def with_plain_integers(patch):
    """Bounds of a range are arrays of one value, which Triton 3.6 cannot convert with NumPy 2.4."""

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patched


interpreter._patch_lang_tensor = with_plain_integers(interpreter._patch_lang_tensor)
triton_weights.PROGRAMS = 12  # so that tokens are dealt out
triton_norm.WARPS = 2  # so that a program takes several tokens

DTYPES = pytest.mark.parametrize("dtype", ROUNDING, ids=str)


@DTYPES
@pytest.mark.parametrize("channels", [5, 16])
@pytest.mark.parametrize("name", SEGMENTS)
def test_norm_equals_the_twin(name, channels, dtype):
    segments, tolerance = SEGMENTS[name], ROUNDING[dtype]
    plan = plan_of(segments)
    x, scale, shift, grad = norm_inputs(segments, tokens=(5,), channels=channels, dtype=dtype)
    parameters = [p.float() for p in (scale, shift)]
    scales = parted(parameters[0], segments)
    forward = (scales, parameters[1], *plan, 1e-3, dtype)
    y = triton_norm.forward(x, None, None, None, *forward)[1]
    assert y.dtype == dtype
    assert relative_error(y, plain_kernels.plain_norm(x, *forward)) <= 2 * tolerance
    exact = norm_by_definition(*(t.double() for t in (x, *parameters)), segments, 1e-3)
    assert relative_error(y, exact) < tolerance
    backward = (scales, parameters[1], *plan, 1e-3)
    twin = plain_kernels.plain_norm_backward(x, grad, *backward)
    dx, _, *sums = triton_norm.backward(x, grad, None, None, None, *backward)
    for ours, reference in zip((dx, *sums), twin, strict=True):
        assert ours.dtype == reference.dtype and ours.shape == reference.shape
        assert relative_error(ours, reference) <= max(2 * tolerance, 2e-5)


def test_segments_may_share_a_scale():
    lengths, weights = zip(*SEGMENTS["octic"], strict=True)
    x, scale, shift, grad = norm_inputs(
        SEGMENTS["octic"], tokens=(4,), channels=6, dtype=torch.float32
    )
    shared = scale[:24].split(6), scale[24:36]
    arguments = ((*shared[0], shared[1]), shift, lengths, weights, (1, 1, 1, 1, 2), 1e-5)
    twin = plain_kernels.plain_norm(x, *arguments, torch.float32)
    assert (
        relative_error(triton_norm.forward(x, None, None, None, *arguments, torch.float32)[1], twin)
        < 2e-6
    )
    twins = plain_kernels.plain_norm_backward(x, grad, *arguments)
    ours = triton_norm.backward(x, grad, None, None, None, *arguments)
    for value, reference in zip((ours[0], *ours[2:]), twins, strict=True):
        assert relative_error(value, reference) < 2e-5


def test_norm_without_scale_or_shift_and_with_another_dtype():
    segments = SEGMENTS["octic"]
    plan = plan_of(segments)
    x, scale, shift, grad = norm_inputs(segments, tokens=(1, 3), channels=6, dtype=torch.float32)
    for s, b in itertools.product(((), parted(scale, segments)), (None, shift)):
        for dtype in ROUNDING:
            arguments = (s, b, *plan, 1e-5, dtype)
            _, y = triton_norm.forward(x, None, None, None, *arguments)
            twin = plain_kernels.plain_norm(x, *arguments)
            assert y.dtype == dtype and relative_error(y, twin) <= 2 * ROUNDING[dtype]
            g = grad.to(dtype)
            dx, _, *sums = triton_norm.backward(x, g, None, None, None, s, b, *plan, 1e-5)
            ours = (dx, *sums)
            twins = plain_kernels.plain_norm_backward(x, g, s, b, *plan, 1e-5)
            for value, reference in zip(ours, twins, strict=True):
                assert (value is None) == (reference is None)
                if value is not None:
                    assert value.dtype == torch.float32 and value.shape == reference.shape
                    assert relative_error(value, reference) < 2e-6


@pytest.mark.parametrize(
    "past, biased, dropped",
    [(False, False, False), (True, False, False), (False, True, False), (True, True, True)],
)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_norm_after_a_sum_equals_the_twin(half, past, biased, dropped):
    segments = SEGMENTS["octic"]
    plan = plan_of(segments)
    x, scale, shift, grad = norm_inputs(segments, tokens=(2, 3), channels=6, dtype=torch.float32)
    branch, through = torch.randn(2, *x.shape)
    branch, grad = branch.to(half), grad.to(half)
    arguments = (parted(scale, segments), shift, *plan, 1e-5)
    bias = torch.randn(6).to(half) if biased else None
    factors = torch.tensor([0.0, 1.25, 1.25, 0.0, 1.25, 1.25]).view(2, 3, 1) if dropped else None
    total, y = triton_norm.forward(x, branch, bias, factors, *arguments, half)
    twin = plain_kernels.plain_residual_norm(x, branch, bias, factors, *arguments, half)
    # The twin rounds the branch with its bias.
    assert relative_error(total, twin[0]) <= (ROUNDING[half] if biased else 0)
    assert y.dtype == half
    assert relative_error(y, twin[1]) <= 2 * ROUNDING[half]
    cast = None if half == torch.float32 and not dropped else half
    backward = (total, grad, through if past else None, factors, cast, *arguments)
    ours, twins = (
        triton_norm.backward(*backward),
        plain_kernels.plain_residual_norm_backward(*backward),
    )
    for value, reference in zip(ours, twins, strict=True):
        assert (value is None) == (reference is None)
        if value is not None:
            assert value.dtype == reference.dtype
            assert relative_error(value, reference) <= max(2 * ROUNDING[value.dtype], 2e-5)


# Heads, widths of a head's rows, parts: D4, C4 or V4 and mirror; widths that are no power of two.
HEADS = [(3, [2] * 4 + [4] * 2, 3), (4, [10] * 4 + [20] * 2, 3), (5, [3] * 2, 1), (2, [8] * 4, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads, widths, parts", HEADS)
def test_heads_are_split_and_joined_as_by_the_twin(heads, widths, parts, dtype):
    x = torch.randn(2, 19, parts * heads * sum(widths)).to(dtype)
    bias = torch.randn(parts * heads * widths[0]).to(dtype)
    for given in (bias, None):
        apart = triton_heads.split(x, given, heads, widths, parts)
        twins = plain_kernels.plain_split(x, given, heads, widths, parts)
        for ours, twin in zip(apart, twins, strict=True):
            # The interpreter rounds sums otherwise than a GPU.
            assert relative_error(ours, twin) <= (0 if given is None else 2 * ROUNDING[dtype])
    assert torch.equal(triton_heads.join(twins, widths), x)
    empty = triton_heads.split(x[:0], None, heads, widths, parts)
    assert empty[0].shape == (0, 19, heads, sum(widths))
    assert triton_heads.join(empty, widths).shape == (0, *x.shape[1:])


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("channels", [5, 32, 300])
def test_bias_is_added_as_by_the_twin(channels, dtype):
    y, bias = torch.randn(75, 2 * channels).to(dtype), torch.randn(channels).to(dtype)
    exact = y.clone()
    exact[:, :channels] += bias
    triton_bias.add(y, bias)
    assert relative_error(y, exact) < 2 * ROUNDING[dtype]
    assert torch.equal(y[:, channels:], exact[:, channels:])


@DTYPES
@pytest.mark.parametrize("channels", [1, 32, 72])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_gelu_equals_the_twin(name, channels, dtype):
    transform, tolerance = TRANSFORMS[name], ROUNDING[dtype]
    shape = (2, 3, 5, channels * len(transform))
    x, grad = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    y = triton_gelu.forward(x, None, transform)
    assert y.dtype == dtype
    assert relative_error(y, plain_kernels.plain_gelu(x, None, transform)) <= 2 * tolerance
    assert relative_error(y, gelu_by_definition(x.double(), transform)) < tolerance
    dx = triton_gelu.backward(x, None, grad, transform)
    assert dx.dtype == dtype
    assert (
        relative_error(dx, plain_kernels.plain_gelu_backward(x, None, grad, transform))
        <= 2 * tolerance
    )


@DTYPES
@pytest.mark.parametrize("channels", [1, 32, 72, 300])
def test_gelu_takes_a_bias_along(channels, dtype):
    transform, tolerance = TRANSFORMS["D4"], ROUNDING[dtype]
    x, grad = (3 * torch.randn(2, 5, channels * 8, dtype=torch.float64)).to(dtype)
    bias = torch.randn(channels).to(dtype)
    total = plain_kernels.with_bias(x.double(), bias)
    y, dx = (
        triton_gelu.forward(x, bias, transform),
        triton_gelu.backward(x, bias, grad, transform),
    )
    assert relative_error(y, gelu_by_definition(total, transform)) < tolerance
    exact = plain_kernels.plain_gelu_backward(total, None, grad.double(), transform)
    assert relative_error(dx, exact) < tolerance


def test_operators_hand_the_kernels_their_arguments(monkeypatch):
    segments, transform = SEGMENTS["octic"], TRANSFORMS["D4"]
    *inputs, grad = norm_inputs(segments, tokens=(2, 3), channels=5, dtype=torch.float32)

    def function(*inputs):
        y = norm_of(*inputs, segments=segments, eps=1e-3)
        return regular_gelu.regular_gelu(y.mT.contiguous().mT, transform)

    plain = gradients(function, inputs, grad)
    calls = []
    for module in (irrep_norm, regular_gelu):
        monkeypatch.setattr(module, "runs_triton", lambda x: calls.append(x) is None)
    monkeypatch.setattr(torch.cuda, "device_of", nullcontext)
    for ours, reference in zip(gradients(function, inputs, grad), plain, strict=True):
        assert relative_error(ours, reference) < 1e-5
    assert len(calls) == 4


# Lines, rows of two-dimensional irreps, channels of a copy (in, out): D4, C4, V4, mirror.
PRODUCTS = [(4, 2, 12, 40), (2, 2, 16, 3), (4, 0, 8, 130), (2, 0, 70, 5)]


# The interpreter multiplies bfloat16 as the integers that hold it.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("lines, rows, given, wanted", PRODUCTS)
def test_products_equal_the_twin(lines, rows, given, wanted, biased, dtype):
    shapes = [(37, given * (lines + 2 * rows)), (lines, wanted, given), (2 * wanted, 2 * given)]
    x, stacked, plane = (torch.randn(s, dtype=torch.float64) for s in shapes)
    inputs = [x, stacked, plane if rows else None, torch.randn(wanted) if biased else None]
    exact = irrep_linear.irrep_linear(*(i if i is None else i.double() for i in inputs))
    inputs = [i if i is None else i.to(dtype) for i in inputs]
    y = triton_linear.forward(*inputs)
    assert y.dtype == dtype and y.shape == exact.shape
    # The factors are rounded too.
    assert relative_error(y, exact) < 2 * ROUNDING[dtype]
    grad = torch.randn(exact.shape, dtype=torch.float64)
    stacked, plane = inputs[1:3]
    twin = irrep_linear._backward_input(
        grad.to(dtype).double(), stacked.double(), None if plane is None else plane.double()
    )
    found = triton_linear.backward_input(grad.to(dtype), stacked, plane)
    assert found.dtype == dtype and found.shape == twin.shape
    assert relative_error(found, twin) < 2 * ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [37, 300, 0])
@pytest.mark.parametrize("lines, rows, given, wanted", PRODUCTS)
def test_gradients_of_the_weights_equal_the_twin(lines, rows, given, wanted, tokens, dtype):
    shapes = [(tokens, given * (lines + 2 * rows)), (lines, wanted, given), (2 * wanted, 2 * given)]
    x, stacked, plane = (torch.randn(s).to(dtype) for s in shapes)
    plane = plane if rows else None
    grad = torch.randn(tokens, wanted * (lines + 2 * rows)).to(dtype)
    exact = irrep_linear._backward_weight(
        *(t if t is None else t.double() for t in (grad, x, stacked, plane))
    )
    for ours, reference in zip(
        triton_weights.backward(grad, x, stacked, plane), exact, strict=True
    ):
        assert ours.dtype == dtype and ours.shape == reference.shape
        if ours.numel() and tokens:
            assert relative_error(ours, reference) < 2 * ROUNDING[dtype]
        else:
            assert torch.equal(ours.double(), reference)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("lines, rows, given, wanted", [*PRODUCTS, (4, 2, 300, 7)])
def test_matrices_equal_the_twin(lines, rows, given, wanted, scaled, biased):
    """Of three layers at once: the one in question between two others."""
    sizes = {"lines": lines, "planes": int(rows > 0), "given": given, "wanted": wanted}
    layers = [
        matrix_sources(scaled=not scaled, biased=True, given=6, wanted=5),
        matrix_sources(scaled=scaled, biased=biased, **sizes),
        matrix_sources(scaled=True, biased=False, given=3, wanted=9),
    ]
    twins = [matrices.plain_stack(layer, torch.float16) for layer in layers]
    parts = [part for twin in twins for part in twin if part is not None]
    for ours, twin in zip(triton_matrices.stack(layers, torch.float16), parts, strict=True):
        assert torch.equal(ours, twin)
    pairs = [
        (matrices.Matrices(*(p if p is None else torch.randn_like(p) for p in twin)), layer)
        for twin, layer in zip(twins, layers, strict=True)
    ]
    exact = [part for pair in pairs for part in matrices.plain_unstack(*pair)]
    for value, reference in zip(triton_matrices.unstack(pairs), exact, strict=True):
        assert value.dtype == reference.dtype and relative_error(value, reference) < 2e-6


def test_layers_that_are_not_trained_have_no_gradients(monkeypatch):
    """Beside others that are, whose matrices are made at the same time."""
    for name in ("takes_triton", "runs_triton"):
        monkeypatch.setattr(matrices, name, lambda x: True)
    monkeypatch.setattr(torch.cuda, "device_of", nullcontext)
    layers = [matrix_sources(scaled=True, biased=True) for _ in range(3)]
    for tensor in layers[1].tensors:
        tensor.requires_grad_()
    found = matrices.stack_matrices(layers)
    for own, layer in zip(found, layers, strict=True):
        twin = matrices.plain_stack(layer, None)
        for part, exact in zip(own, twin, strict=True):
            assert relative_error(part.detach(), exact.detach()) < 2e-6
            assert part.requires_grad == (layer is layers[1])
    grads = [torch.randn_like(part) for part in found[1]]
    ours = torch.autograd.grad(found[1], layers[1].tensors, grads)
    twins = torch.autograd.grad(matrices.plain_stack(layers[1], None), layers[1].tensors, grads)
    for value, reference in zip(ours, twins, strict=True):
        assert relative_error(value, reference) < 2e-6
    with torch.no_grad():
        assert not any(
            part.requires_grad for own in matrices.stack_matrices(layers) for part in own
        )


def test_the_operator_hands_the_products_their_arguments(monkeypatch):
    inputs = [torch.randn(s) for s in ((2, 3, 32), (4, 5, 4), (10, 8), (5,))]
    grad = torch.randn(2, 3, 40)
    plain = gradients(irrep_linear.irrep_linear, inputs, grad)
    calls = []
    monkeypatch.setattr(irrep_linear, "_uses_triton", lambda x, worth: calls.append(x) is None)
    monkeypatch.setattr(torch.cuda, "device_of", nullcontext)
    for ours, reference in zip(
        gradients(irrep_linear.irrep_linear, inputs, grad), plain, strict=True
    ):
        assert relative_error(ours, reference) < 1e-5
    assert len(calls) == 3, "forward, the gradients of the input and of the weights"


def test_empty_inputs():
    stacked, plane = torch.empty(4, 6, 2), torch.empty(12, 4)
    assert triton_linear.forward(torch.empty(0, 16), stacked, plane, None).shape == (0, 48)
    plan = plan_of(SEGMENTS["octic"])
    x, scale, shift = torch.empty(0, 3, 16), torch.ones(16), torch.ones(2)
    assert triton_gelu.forward(x, None, TRANSFORMS["D4"]).shape == x.shape
    assert triton_gelu.backward(x, None, x, TRANSFORMS["D4"]).shape == x.shape
    arguments = (parted(scale, SEGMENTS["octic"]), shift, *plan, 1e-5)
    assert triton_norm.forward(x, None, None, None, *arguments, torch.float32)[1].shape == x.shape
    dx, _, dscale, dshift = triton_norm.backward(x, x, None, None, None, *arguments)
    assert dx.shape == x.shape
    assert torch.equal(dscale, torch.zeros(16)) and torch.equal(dshift, torch.zeros(2))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_straight_line_programs_compute_the_matrix(name):
    for matrix in (torch.tensor(TRANSFORMS[name], dtype=torch.float64).mT, TRANSFORMS[name]):
        matrix = torch.as_tensor(matrix, dtype=torch.float64)
        steps, outputs = triton_gelu.straight_line_program(tuple(map(tuple, matrix.tolist())))
        x = torch.randn(len(matrix), dtype=torch.float64)
        values = list(x)
        for a, b, ratio in steps:
            values.append(values[a] + ratio * values[b])
        result = torch.stack([values[index] * factor for index, factor in outputs])
        assert torch.allclose(result, matrix @ x, atol=1e-11)
        if name == "D4":
            assert len(steps) == 24
