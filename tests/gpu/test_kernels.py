"""The Triton kernels on a real GPU, at the sizes of the published models, against their twins."""

import pytest
import torch

from octic import matrices, plain_kernels
from octic.device import takes_triton
from octic.heads import join_heads, split_heads
from octic.irrep_linear import irrep_linear
from octic.regular_gelu import regular_gelu
from tests.octic.kernel_cases import (
    SEGMENTS,
    TRANSFORMS,
    gelu_by_definition,
    gradients,
    matrix_sources,
    norm_by_definition,
    norm_inputs,
    norm_of,
    norm_of_sum,
    parted,
    plan_of,
    relative_error,
)

pytestmark = pytest.mark.gpu
OCTIC, D4 = SEGMENTS["octic"], TRANSFORMS["D4"]
# One rounding of a result of the largest magnitude.
ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = pytest.mark.parametrize("dtype", ROUNDING, ids=str)


@pytest.fixture(autouse=True)
def triton_is_used():
    pytest.importorskip("triton")
    assert takes_triton(torch.empty(1, device="cuda"))


@DTYPES
@pytest.mark.parametrize("channels", [7, 48, 96, 128, 160, 640, 1280])
@pytest.mark.parametrize("name", SEGMENTS)
def test_norm_is_its_definition_and_its_twin(name, channels, dtype):
    segments, tolerance = SEGMENTS[name], ROUNDING[dtype]
    tokens = (16, 197) if channels < 640 else (3, 197)
    *inputs, grad = norm_inputs(
        segments, tokens=tokens, channels=channels, dtype=dtype, device="cuda"
    )
    ours = gradients(lambda *a: norm_of(*a, segments=segments, eps=1e-5), inputs, grad)
    doubles = [t.double() for t in inputs]
    exact = gradients(lambda *a: norm_by_definition(*a, segments, 1e-5), doubles, grad)
    for value, reference in zip(ours, exact, strict=True):
        assert value.dtype == dtype
        assert relative_error(value, reference) < tolerance
    plan = plan_of(segments)
    x, scale, shift = inputs
    options = (*plan, 1e-5, dtype)
    twin = plain_kernels.plain_norm(x, parted(scale, segments), shift, *options)
    assert relative_error(ours[0], twin) <= 2 * tolerance


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [7, 48, 128, 160])
def test_norm_after_a_sum_is_the_norm_of_the_sum(channels, dtype, dropped):
    *inputs, grad = norm_inputs(
        OCTIC, tokens=(16, 197), channels=channels, dtype=torch.float32, device="cuda"
    )
    branch, past = torch.randn(2, *grad.shape, device="cuda")
    factors = torch.randint(2, (16, 1, 1), device="cuda") * 2.0 if dropped else None
    found = []
    for together in (True, False):
        x, scale, shift, other = (t.clone().requires_grad_() for t in (*inputs, branch.to(dtype)))
        options = {"segments": OCTIC, "dtype": dtype}
        if together:
            total, y = norm_of_sum(x, other, scale, shift, factors=factors, **options)
        else:
            total = x + (other if factors is None else other * factors)
            y = norm_of(total, scale, shift, **options)
        torch.autograd.backward([total, y], [past, grad.to(dtype)])
        found.append([total, y, *(t.grad for t in (x, other, scale, shift))])
    assert torch.equal(found[0][0], found[1][0])
    for ours, reference in zip(*found, strict=True):
        assert ours.dtype == reference.dtype
        assert relative_error(ours, reference) < 2 * ROUNDING[ours.dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("heads, width", [(16, 10), (6, 8), (12, 8), (5, 3)])
def test_heads_are_split_and_joined_and_back(heads, width, dtype):
    widths = [width] * 4 + [2 * width] * 2
    x = torch.randn(8, 197, 24 * heads * width, device="cuda", dtype=dtype, requires_grad=True)
    parts = split_heads(x, heads, widths, 3)
    twins = plain_kernels.plain_split(x, None, heads, widths, 3)
    assert all(torch.equal(*pair) for pair in zip(parts, twins, strict=True))
    grads = [torch.randn_like(part) for part in parts]
    (dx,) = torch.autograd.grad(parts, x, grads)
    assert torch.equal(dx, plain_kernels.plain_join(grads, widths))
    assert torch.equal(join_heads(parts, widths), x)
    one = join_heads(parts[:1], widths)
    assert torch.equal(split_heads(one, heads, widths, 1)[0], parts[0])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(
    "lines, planes, given, wanted", [(4, 1, 160, 480), (4, 0, 48, 7), (2, 1, 640, 160)]
)
def test_matrices_are_stacked_scaled_and_cast(lines, planes, given, wanted, scaled, compiled):
    """Of two layers in one launch."""
    sizes = {"lines": lines, "planes": planes, "given": given, "wanted": wanted}
    layers = [
        matrix_sources(scaled=scaled, biased=True, **sizes, device="cuda"),
        matrix_sources(scaled=not scaled, biased=False, given=64, wanted=24, device="cuda"),
    ]
    tensors, layout = [t for layer in layers for t in layer.tensors], matrices._layout(layers)

    def parts_of(stacked):
        return [part for own in stacked for part in own if part is not None]

    def ours(*tensors):
        own = matrices.layers_of(tensors, layout)
        return parts_of(matrices.stack_matrices(own, dtype=torch.bfloat16))

    def twin(*tensors):
        own = matrices.layers_of(tensors, layout)
        return parts_of(matrices.plain_stack(layer, torch.bfloat16) for layer in own)

    found, grads = [], None
    for function in (torch.compile(ours, fullgraph=True) if compiled else ours, twin):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        outputs = function(*leaves)
        grads = grads or [torch.randn_like(part) for part in outputs]
        torch.autograd.backward(outputs, grads)
        found.append([*outputs, *(leaf.grad for leaf in leaves)])
    for value, reference in zip(*found, strict=True):
        assert value.dtype == reference.dtype
        # The twin's gradient passes through bfloat16 before it is summed.
        assert relative_error(value, reference) < 2 * ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("kernel", ["auto", "products", "triton"])
@pytest.mark.parametrize("compiled", [False, True])
@DTYPES
@pytest.mark.parametrize(
    "lines, rows, given, wanted",
    [(4, 2, 48, 144), (4, 2, 128, 512), (4, 2, 640, 160), (2, 2, 7, 5), (2, 0, 96, 288)],
)
def test_products_and_their_gradients_by_every_kernel(
    lines, rows, given, wanted, dtype, compiled, kernel, monkeypatch
):
    shapes = [(8, 197, given * (lines + 2 * rows)), (lines, wanted, given)]
    shapes += [(2 * wanted, 2 * given), (wanted,)] if rows else [(wanted,)]
    inputs = [torch.randn(s, device="cuda").to(dtype) for s in shapes]
    grad = torch.randn(8, 197, wanted * (lines + 2 * rows), device="cuda")

    def function(*inputs):
        x, matrices, *plane, bias = inputs
        return irrep_linear(x, matrices, *(plane or [None]), bias)

    exact = gradients(function, [t.double() for t in inputs], grad.to(dtype).double())
    monkeypatch.setenv("OCTIC_LINEAR", kernel)
    ours = torch.compile(function, fullgraph=True) if compiled else function
    for value, reference in zip(gradients(ours, inputs, grad), exact, strict=True):
        assert value.dtype == dtype
        assert relative_error(value, reference) < 2 * ROUNDING[dtype]


@DTYPES
@pytest.mark.parametrize("channels", [7, 48, 192, 512, 640])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_gelu_is_its_definition_and_its_twin(name, channels, dtype):
    transform, tolerance = TRANSFORMS[name], ROUNDING[dtype]
    shape = (2, 8, 197, channels * len(transform))
    x, grad = (2 * torch.randn(shape, dtype=torch.float64, device="cuda")).to(dtype)
    ours = gradients(lambda x: regular_gelu(x, transform), [x], grad)
    exact = gradients(lambda x: gelu_by_definition(x, transform), [x.double()], grad)
    for value, reference in zip(ours, exact, strict=True):
        assert value.dtype == dtype
        assert relative_error(value, reference) < tolerance
    assert relative_error(ours[0], plain_kernels.plain_gelu(x, None, transform)) <= 2 * tolerance


def test_float64_is_computed_in_float64():
    *inputs, grad = norm_inputs(OCTIC, tokens=(40,), channels=5, dtype=torch.float64, device="cuda")

    def ours(*a):
        return regular_gelu(norm_of(*a, segments=OCTIC), D4)

    def exact(*a):
        return gelu_by_definition(norm_by_definition(*a, OCTIC, 1e-5), D4)

    for value, reference in zip(
        gradients(ours, inputs, grad), gradients(exact, inputs, grad), strict=True
    ):
        assert relative_error(value, reference) < 1e-12


@pytest.mark.parametrize("shape", [(0, 5, 64), (64,), (3, 1, 64)])
def test_any_token_axes(shape):
    x = torch.randn(shape, device="cuda", requires_grad=True)
    y = regular_gelu(norm_of(x, torch.ones(64, device="cuda"), segments=OCTIC), D4)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape


def test_the_same_bits_every_time():
    *inputs, grad = norm_inputs(
        OCTIC, tokens=(5000,), channels=96, dtype=torch.bfloat16, device="cuda"
    )
    runs = [gradients(lambda *a: norm_of(*a, segments=OCTIC), inputs, grad) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autocast_keeps_the_dtype_and_mixed_parameters_work():
    *inputs, grad = norm_inputs(
        OCTIC, tokens=(50,), channels=16, dtype=torch.float32, device="cuda"
    )
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = norm_of(*inputs, segments=OCTIC)
        half = norm_of(*inputs, segments=OCTIC, dtype=torch.bfloat16)
    assert y.dtype == torch.float32 and torch.equal(half, y.bfloat16())
    ours = gradients(
        lambda x, *a: norm_of(x, *(p.float() for p in a), segments=OCTIC),
        [t.bfloat16() for t in inputs],
        grad,
    )
    assert [t.dtype for t in ours] == [torch.bfloat16] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_no_graph_break_and_the_same_results_when_compiled(mode, dtype):
    *inputs, grad = norm_inputs(OCTIC, tokens=(8, 197), channels=96, dtype=dtype, device="cuda")

    def function(x, scale, shift):
        return regular_gelu(norm_of(x * 2, scale, shift, segments=OCTIC), D4) + 1

    compiled = torch.compile(function, fullgraph=True, mode=mode)
    plain = gradients(function, inputs, grad)
    for _ in range(3):  # graphs are recorded at the second call
        ours = [t.clone() for t in gradients(compiled, inputs, grad)]
    for value, reference in zip(ours, plain, strict=True):
        assert relative_error(value, reference) < 2 * ROUNDING[dtype]


def test_operators_are_registered_completely():
    plan = plan_of(OCTIC)
    x, scale, shift, grad = norm_inputs(
        OCTIC, tokens=(2, 3), channels=4, dtype=torch.float32, device="cuda"
    )
    flat = [entry for row in D4 for entry in row]
    ops = torch.ops.octic
    options = (parted(scale, OCTIC), shift, *plan, 1e-5)
    torch.library.opcheck(ops.irrep_norm, (x, grad, None, *options, torch.float32))
    torch.library.opcheck(ops.regular_gelu, (x, scale[:4], flat))
    torch.library.opcheck(ops.irrep_norm_backward, (grad, grad, x, *options, None))
    torch.library.opcheck(ops.regular_gelu_backward, (grad, x, scale[:4], flat))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    width = 8 * 160
    rows = 2**31 // width + 1000
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * 2 * rows * width:
        pytest.skip("needs 20 GiB of free GPU memory")
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    x[-500:] = torch.randn(500, width, device="cuda")
    plan = plan_of(OCTIC)
    end = x[-500:].clone()
    assert torch.equal(norm_of(x, segments=OCTIC)[-500:], norm_of(end, segments=OCTIC))
    assert torch.equal(regular_gelu(x, D4)[-500:], regular_gelu(end, D4))
    ops = torch.ops.octic
    arguments = ((), None, *plan, 1e-5, None)
    dx = ops.irrep_norm_backward(x, None, x, *arguments)[0][-500:]
    assert torch.equal(dx, ops.irrep_norm_backward(end, None, end, *arguments)[0])
