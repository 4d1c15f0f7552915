"""The operators compute their definitions, differentiate, compile, and survive odd inputs."""

from re import escape

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from octic import matrices, plain_kernels
from octic.block import OcticBlock
from octic.heads import split_heads
from octic.irrep_linear import irrep_linear, linear_kernel
from octic.irrep_norm import irrep_norm
from octic.precision import float32_products
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

OCTIC, D4 = SEGMENTS["octic"], TRANSFORMS["D4"]
# One rounding of a result of the largest magnitude.
ROUNDING = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", SEGMENTS)
def test_norm_is_its_definition_forward_and_backward(name, dtype):
    segments = SEGMENTS[name]
    *inputs, grad = norm_inputs(segments, tokens=(3, 5), channels=7, dtype=dtype)
    ours = gradients(lambda *a: norm_of(*a, segments=segments, eps=1e-3), inputs, grad)
    exact = gradients(
        lambda *a: norm_by_definition(*a, segments, 1e-3), [t.double() for t in inputs], grad
    )
    for value, reference in zip(ours, exact, strict=True):
        assert value.dtype == dtype
        assert relative_error(value, reference) < ROUNDING[dtype]


def test_rows_of_an_irrep_share_a_scale():
    """As the norm of one tensor of factors that repeats them; gradients are summed."""
    *inputs, grad = norm_inputs(OCTIC, tokens=(3, 5), channels=7, dtype=torch.float64)
    x, scale, shift = inputs
    own = [*scale[:28].split(7), scale[28:42]]

    def shared(x, shift, *scales):
        return irrep_norm(x, scales, shift, segments=OCTIC, rows=[1, 1, 1, 1, 2])

    def repeated(x, shift, *scales):
        return norm_of(x, torch.cat([*scales, scales[-1]]), shift, segments=OCTIC)

    found = [gradients(function, [x, shift, *own], grad) for function in (shared, repeated)]
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_gelu_is_its_definition_forward_and_backward(name, dtype):
    transform = TRANSFORMS[name]
    x, grad = torch.randn(2, 3, 5, 7 * len(transform), dtype=torch.float64).to(dtype)
    ours = gradients(lambda x: regular_gelu(x, transform), [x], grad)
    exact = gradients(lambda x: gelu_by_definition(x, transform), [x.double()], grad)
    for value, reference in zip(ours, exact, strict=True):
        assert value.dtype == dtype
        assert relative_error(value, reference) < ROUNDING[dtype]


def test_gelu_in_pieces_is_gelu_at_once(monkeypatch):
    x, grad = torch.randn(2, 3, 11, 7 * 8, dtype=torch.float64)
    whole = gradients(lambda x: regular_gelu(x, D4), [x], grad)
    monkeypatch.setattr(plain_kernels, "PIECE", 4 * 56)
    pieces = gradients(lambda x: regular_gelu(x, D4), [x], grad)
    assert all(torch.equal(*pair) for pair in zip(whole, pieces, strict=True))


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_norm_after_a_sum_is_the_norm_of_the_sum(dtype):
    """Value and gradients, whichever of the two results is used further."""
    *inputs, grad = norm_inputs(OCTIC, tokens=(3, 5), channels=7, dtype=dtype)
    inputs, past = [inputs[0], torch.randn_like(inputs[0]), *inputs[1:]], torch.randn_like(grad)

    def together(x, branch, scale, shift):
        return norm_of_sum(x, branch, scale, shift, segments=OCTIC, eps=1e-3)

    def apart(x, branch, scale, shift):
        total = x + branch
        return total, norm_of(total, scale, shift, segments=OCTIC, eps=1e-3)

    for used in ((past, grad), (past, None), (None, grad)):
        found = []
        for function in (together, apart):
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            outputs = function(*leaves)
            pairs = [(y, g) for y, g in zip(outputs, used, strict=True) if g is not None]
            torch.autograd.backward(*zip(*pairs, strict=True))
            found.append([*outputs, *(leaf.grad for leaf in leaves)])
        for ours, reference in zip(*found, strict=True):
            assert (ours is None) == (reference is None)
            assert ours is None or relative_error(ours, reference) <= 2 * ROUNDING[dtype]


@pytest.mark.parametrize("shape", [None, (3, 1, 1), (1, 5, 1), (3, 5, 1)], ids=str)
def test_norm_after_a_sum_takes_the_branchs_bias_and_factors_along(shape):
    """Drop path's factors, of samples or of packed tokens, multiply the branch and its bias."""
    *inputs, grad = norm_inputs(OCTIC, tokens=(3, 5), channels=7, dtype=torch.float64)
    x, scale, shift = inputs
    branch, bias = torch.randn_like(x), torch.randn(7).double()
    padded = torch.cat([bias, bias.new_zeros(49)])
    factors = None if shape is None else torch.bernoulli(torch.full(shape, 0.5)).double() / 0.5

    def together(x, branch, *affine):
        options = {"segments": OCTIC, "bias": bias, "factors": factors}
        return sum(norm_of_sum(x, branch, *affine, **options))

    def apart(x, branch, *affine):
        branch = (branch + padded) * (1 if factors is None else factors)
        return sum(norm_of_sum(x, branch, *affine, segments=OCTIC))

    found = [gradients(each, [x, branch, scale, shift], grad) for each in (together, apart)]
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    total, y = norm_of_sum(x, branch.requires_grad_(), segments=OCTIC, factors=factors)
    for used in (total, y):  # each alone
        assert branch.grad is None
        used.square().sum().backward(retain_graph=True)
        assert ((branch.grad == 0) == (factors is not None and factors == 0)).all()
        branch.grad = None
    with pytest.raises(ValueError, match=r"bias has shape \[56\]; it must be \[7\]"):
        norm_of_sum(x, branch, segments=OCTIC, bias=padded)


def test_norm_after_a_sum_of_two_dtypes():
    *inputs, grad = norm_inputs(OCTIC, tokens=(9,), channels=4, dtype=torch.float32)
    branch = torch.randn_like(inputs[0]).bfloat16().requires_grad_()
    x = inputs[0].requires_grad_()
    options = {"segments": OCTIC, "dtype": torch.bfloat16}
    total, y = norm_of_sum(x, branch, *inputs[1:], **options)
    assert torch.equal(total, x + branch) and y.dtype == torch.bfloat16
    assert torch.equal(y, norm_of(total, *inputs[1:], **options))
    y.backward(grad.bfloat16())
    assert torch.equal(branch.grad, x.grad.bfloat16())
    with pytest.raises(ValueError, match=r"a branch of shape \[4, 32\] beside x of \[9, 32\]"):
        norm_of_sum(x, branch[:4], segments=OCTIC)


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("with_shift", [False, True])
def test_norm_gradients_by_finite_differences(with_scale, with_shift):
    x, scale, shift, _ = norm_inputs(OCTIC, tokens=(3,), channels=3, dtype=torch.float64)
    inputs = [x] + [scale] * with_scale + [shift] * with_shift

    def norm(x, *rest):
        rest = list(rest)
        scale = rest.pop(0) if with_scale else None
        shift = rest.pop(0) if with_shift else None
        return norm_of(x, scale, shift, segments=OCTIC, eps=1e-5)

    assert torch.autograd.gradcheck(norm, [t.requires_grad_() for t in inputs])


def test_gelu_gradients_by_finite_differences():
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: regular_gelu(x, D4), [x])


@pytest.mark.parametrize("tokens", [(), (1,), (0, 4), (4, 0), (2, 3, 4)])
def test_any_token_axes(tokens):
    x = torch.randn(*tokens, 24, requires_grad=True)
    y = norm_of(regular_gelu(x, D4), torch.ones(24), segments=OCTIC, eps=1e-5)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape


def test_strided_inputs_equal_dense_ones():
    strided = torch.randn(24, 3, 5).permute(2, 1, 0)
    dense = strided.contiguous()
    for function in (
        lambda x: regular_gelu(x, D4),
        lambda x: norm_of(x, segments=OCTIC),
    ):
        grad = torch.randn(1, 1, 24).expand(5, 3, 24)
        for ours, reference in zip(
            gradients(function, [strided], grad), gradients(function, [dense], grad), strict=True
        ):
            assert torch.equal(ours, reference)


@pytest.mark.parametrize(
    "view", [lambda x: x[:, 5:29], lambda x: x.mT[:, 5:29], lambda x: x[0].expand(40, -1)[:, 5:29]]
)
def test_linear_reads_features_of_any_strides(view):
    """Its products take them as they lie, and the gradient of its result too."""
    inputs = [torch.randn(*shape).double() for shape in ((40, 40), (4, 5, 3), (10, 6), (5,))]
    grad = torch.randn(40, 40).double().mT
    found = [
        gradients(lambda x, *own, read=read: irrep_linear(read(x), *own), inputs, grad)
        for read in (view, lambda x: view(x).contiguous())
    ]
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def test_large_offsets_do_not_harm_the_variance():
    x = torch.randn(5, 16) + 1e4
    exact = norm_by_definition(x.double(), None, None, OCTIC, 1e-5)
    assert (
        relative_error(norm_of(x, segments=OCTIC, eps=1e-5), exact) < 5e-3
    )  # a variance from squares: none right


def test_norm_writes_the_dtype_it_is_asked_for():
    *inputs, grad = norm_inputs(OCTIC, tokens=(9,), channels=4, dtype=torch.float32)
    full = gradients(lambda *a: norm_of(*a, segments=OCTIC), inputs, grad.bfloat16())
    half = gradients(
        lambda *a: norm_of(*a, segments=OCTIC, dtype=torch.bfloat16), inputs, grad.bfloat16()
    )
    assert torch.equal(half[0], full[0].bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(half[1:], full[1:], strict=True))


def test_autocast_changes_nothing():
    x = torch.randn(6, 32)
    plain = regular_gelu(x, D4), norm_of(x, segments=OCTIC)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = regular_gelu(x, D4), norm_of(x, torch.ones(32), segments=OCTIC)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_autocast_leaves_float64_alone():
    """As torch does, whose own products of float64 stay so."""
    block, x = OcticBlock(32, num_heads=2, init_values=0.1).double(), torch.randn(2, 3, 32).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = block(x)
    assert torch.equal(cast, block(x))


@pytest.mark.parametrize("shape", [(0, 3, 32), (2, 0, 32)])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float32], ids=str)
def test_an_empty_batch_has_empty_gradients(shape, half):
    x, branch = (
        torch.randn(shape, dtype=dtype, requires_grad=True) for dtype in (torch.float32, half)
    )
    total, y = norm_of_sum(x, branch, torch.ones(32), segments=OCTIC, dtype=half)
    y = torch.cat(split_heads(y, 1, [4] * 4 + [8] * 2, 1)).squeeze(-2)
    y = irrep_linear(
        regular_gelu(y, D4), *(torch.randn(s).to(half) for s in ((4, 3, 4), (6, 8))), None
    )
    grads = torch.autograd.grad((total, y), (x, branch), (total, y))
    assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype), (x.shape, half)]


def test_float32_products_are_as_torch_was_told():
    """By its newer setting too, after which torch refuses to read the older one."""
    matmul, legacy = torch.backends.cuda.matmul, torch.set_float32_matmul_precision
    before = matmul.fp32_precision
    try:
        for told in ("highest", "high", "medium"):
            legacy(told)
            assert float32_products() == ("ieee" if told == "highest" else "tf32")
        for told in ("ieee", "tf32"):
            matmul.fp32_precision = told
            assert float32_products() == told
    finally:
        legacy("highest")
        matmul.fp32_precision = before


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="12 channels are not a multiple of the group's order 8"):
        regular_gelu(torch.ones(2, 12), D4)
    with pytest.raises(ValueError, match=r"bias has shape \[3\]; it must be \[2\]"):
        regular_gelu(torch.ones(2, 16), D4, torch.ones(3))
    with pytest.raises(ValueError, match="12 channels"):
        irrep_norm(torch.ones(2, 12), segments=OCTIC)
    with pytest.raises(ValueError, match=r"1 scales with rows \[1\] for 6 segments"):
        irrep_norm(torch.ones(2, 16), [torch.ones(16)], segments=OCTIC)
    with pytest.raises(ValueError, match=r"scale 4 has shape \[2\]; it must be \[4\]"):
        irrep_norm(torch.ones(2, 16), [torch.ones(2)] * 6, segments=OCTIC)
    with pytest.raises(ValueError, match=escape("scale 0 is for segments of lengths [1, 1, 2];")):
        irrep_norm(torch.ones(2, 8), [torch.ones(2)], segments=[(1, 1), (1, 1), (2, 1)], rows=[3])
    with pytest.raises(ValueError, match=escape("scale 1 is for segments of lengths [];")):
        irrep_norm(torch.ones(2, 8), [torch.ones(2)] * 2, segments=[(1, 1)] * 4, rows=[4, 0])
    with pytest.raises(ValueError, match=r"shift has shape \[16\]; it must be \[2\]"):
        irrep_norm(torch.ones(2, 16), shift=torch.ones(16), segments=OCTIC)


def test_operators_are_registered_completely():
    plan = plan_of(OCTIC)
    x, scale, shift, grad = norm_inputs(OCTIC, tokens=(2, 3), channels=2, dtype=torch.float32)
    flat = [entry for row in D4 for entry in row]
    check, ops = torch.library.opcheck, torch.ops.octic
    for parameters in ((parted(scale, OCTIC), shift), ((), None)):
        arguments = (*parameters, *plan, 1e-5)
        branch = torch.randn_like(x).bfloat16()
        factors = torch.tensor([0.0, 1.25]).view(2, 1, 1).expand(2, 3, 1)
        for summand in ((None,) * 3, (branch, None, None), (branch, shift, factors)):
            check(ops.irrep_norm, (x, *summand, *arguments, torch.bfloat16))
        for past, each, kind in ((None,) * 3, (grad, None, None), (grad, factors, torch.bfloat16)):
            check(ops.irrep_norm_backward, (grad, past, x, each, *arguments, kind))
    for bias in (torch.randn(6), None):
        check(ops.split_heads, (torch.randn(2, 3, 48), bias, 2, [1, 1, 1, 1, 2, 2], 3))
    check(ops.join_heads, ([torch.randn(2, 3, 2, 8)] * 3, [1, 1, 1, 1, 2, 2]))
    check_matrices(check, ops)
    for bias in (shift, None):
        check(ops.regular_gelu, (x, bias, flat))
        check(ops.regular_gelu_backward, (grad, x, bias, flat))
    flat_x, lines, plane = x.flatten(0, 1), torch.randn(4, 2, 2), torch.randn(4, 4)
    for matrix, bias in ((plane, torch.randn(2)), (None, None)):
        part = flat_x if matrix is not None else flat_x[:, :8]
        check(ops.irrep_linear, (part, lines, matrix, bias))
        check(ops.irrep_linear_backward_input, (part, lines, matrix))
        check(ops.irrep_linear_backward_weight, (part, part, lines, matrix))


def check_matrices(check, ops):
    layers = [matrix_sources(scaled=True, biased=True), matrix_sources(scaled=False, biased=False)]
    tensors, layout = [t for layer in layers for t in layer.tensors], matrices._layout(layers)
    check(ops.stack_matrices, (tensors, layout, torch.bfloat16))
    found = ops.stack_matrices(tensors, layout, torch.float32)
    check(ops.stack_matrices_backward, ([torch.randn_like(t) for t in found], tensors, layout))


@pytest.mark.slow
def test_no_graph_break_and_the_same_results_when_compiled():
    *inputs, grad = norm_inputs(OCTIC, tokens=(2, 3), channels=4, dtype=torch.float32)

    def function(x, scale, shift):
        x = norm_of(x * 2, scale, shift, segments=OCTIC, eps=1e-5)
        return regular_gelu(x, D4) + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for tokens in (2, 5):  # the second shape runs with symbolic sizes
        cut = [torch.randn(tokens, 3, 32), *inputs[1:]]
        grad = torch.randn(tokens, 3, 32)
        for ours, reference in zip(
            gradients(compiled, cut, grad), gradients(function, cut, grad), strict=True
        ):
            torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_recomputed_activations_give_the_same_gradients():
    *inputs, grad = norm_inputs(OCTIC, tokens=(2, 3), channels=4, dtype=torch.float32)

    def function(*a):
        return regular_gelu(norm_of(*a, segments=OCTIC), D4)

    plain = gradients(function, inputs, grad)
    recomputed = gradients(lambda *a: checkpoint(function, *a, use_reentrant=False), inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_multiply_adds_are_counted(device):
    x = torch.randn(2, 16, device=device, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = regular_gelu(norm_of(x, segments=OCTIC), D4)
        y.backward(torch.empty_like(y))
    assert counter.get_total_flops() == 0
    assert torch.ops.octic.regular_gelu in counter.get_flop_counts()["Global"]
    assert x.grad.device.type == device


def test_an_unknown_kernel_of_linear_layers_is_refused(monkeypatch):
    assert linear_kernel() == "auto"
    monkeypatch.setenv("OCTIC_LINEAR", "cutlass")
    with pytest.raises(
        ValueError, match="OCTIC_LINEAR=cutlass is unknown; known: auto, products, tri"
    ):
        linear_kernel()
