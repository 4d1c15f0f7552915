"""Octic nets under torch.func, torch.export with gradients, and derivatives of derivatives."""

import copy
from functools import partial

import pytest
import torch
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from octic import composed, matrices
from octic.irrep_linear import irrep_linear
from octic.irrep_norm import irrep_norm, residual_norm
from octic.layers import OcticGELU, OcticLayerNorm
from octic.vision_transformer import OcticVisionTransformer
from tests.octic.kernel_cases import matrix_sources

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
SIZES |= {"num_classes": 3, "init_values": 0.5}


@pytest.fixture(scope="module", params=["hybrid", "invariant"])
def net(request):
    torch.manual_seed(0)
    made = OcticVisionTransformer(**SIZES, invariant=request.param == "invariant").double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=generator)


def loss(net, parameters, image):
    return functional_call(net, parameters, (image[None],)).square().sum()


def test_gradients_of_each_sample(net, images):
    """vmap(grad) gives the gradients that one pass for each image gives."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    found = vmap(grad(loss, argnums=1), in_dims=(None, None, 0))(net, parameters, images)
    for index, image in enumerate(images):
        net.zero_grad()
        net(image[None]).square().sum().backward()
        for name, parameter in net.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found[name][index], expected, rtol=1e-9, atol=1e-10)


def test_forward_mode(net, images):
    direction = torch.randn_like(images)
    with sdpa_kernel(SDPBackend.MATH):
        _, found = jvp(net, (images,), (direction,))
    with torch.no_grad():
        step = 1e-5
        expected = (net(images + step * direction) - net(images - step * direction)) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_an_ensemble_runs_as_one(net, images):
    nets = [net, copy.deepcopy(net)]
    with torch.no_grad():
        nets[1].head.weight.mul_(2)
    parameters, buffers = stack_module_state(nets)

    def run(parameters, buffers):
        return functional_call(net, (parameters, buffers), (images,))

    found = vmap(run)(parameters, buffers)
    for each, one in zip(found, nets, strict=True):
        torch.testing.assert_close(each, one(images), rtol=1e-9, atol=1e-10)


def test_a_gradient_has_a_gradient(net, images):
    """The penalty on the input's gradient, as of a plain net; held against finite differences."""
    weight = next(p for name, p in net.named_parameters() if name.endswith("qkv.lin_A1.weight"))

    def penalty():
        x = images.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        return slope.square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        (found,) = torch.autograd.grad(penalty(), weight)
        direction, step = torch.randn_like(weight), 1e-5
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(direction, alpha=sign * step)
            ends.append(penalty().detach())
            with torch.no_grad():
                weight.sub_(direction, alpha=sign * step)
    expected = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close((found * direction).sum(), expected, rtol=1e-5, atol=1e-8)


def operators():
    """Each operator as a function of tensors, with the composed twin of the same arguments."""
    torch.manual_seed(2)
    x, branch = torch.randn(2, 5, 32).double(), torch.randn(2, 5, 32).double()
    norm = OcticLayerNorm(32).double()
    scales = [torch.rand_like(p) + 0.5 for p in norm.scaling.factors()]
    shift, lines = torch.randn(4).double(), torch.randn(4, 4, 4).double()
    plane, bias = torch.randn(8, 8).double(), torch.randn(4).double()
    options = {"segments": norm.segments, "rows": norm.rows, "eps": 1e-5}
    return {
        "linear": (irrep_linear, (x, lines, plane, bias), {}),
        "gelu": (OcticGELU(), (x,), {}),
        "norm": (lambda x, shift, *s: irrep_norm(x, s, shift, **options), (x, shift, *scales), {}),
        "residual norm": (
            lambda x, b, shift, *s: residual_norm(x, b, s, shift, **options),
            (x, branch, shift, *scales),
            {},
        ),
    }


@pytest.mark.parametrize("name", operators())
def test_operators_agree_with_their_spelling_and_differentiate_twice(name, monkeypatch):
    function, tensors, keywords = operators()[name]
    tensors = [tensor.requires_grad_() for tensor in tensors]

    def run(*tensors):
        return function(*tensors, **keywords)

    found = run(*tensors)
    monkeypatch.setattr(composed, "is_composed", lambda: True)
    torch.testing.assert_close(run(*tensors), found, rtol=1e-10, atol=1e-12)
    monkeypatch.undo()
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


def partial_operators():
    """Operators that do less, or leave a bias to the next one, as functions of tensors."""
    torch.manual_seed(2)
    x, branch = torch.randn(2, 5, 32).double(), torch.randn(2, 5, 32)
    lines, plane, bias = (torch.randn(*shape).double() for shape in ((4, 4, 4), (8, 8), (4,)))
    segments, gelu = OcticLayerNorm(32).segments, OcticGELU()
    factors = torch.tensor([0.0, 1.25]).double().view(2, 1, 1)
    layer = matrix_sources(scaled=True, biased=True, dtype=torch.float64)
    stack = partial(matrices._Stack.apply, matrices._layout([layer]), torch.float64)
    return {
        "linear, bias later": (partial(irrep_linear, add_bias=False), (x, lines, plane, bias)),
        "linear, lines alone": (lambda x, w: irrep_linear(x, w, None, None), (x[..., :16], lines)),
        "gelu of a bias": (lambda x: gelu(x, bias), (x,)),
        "norm alone": (lambda x: irrep_norm(x, segments=segments), (x,)),
        "norm of x and a float32 branch": (
            lambda x, b: residual_norm(x, b, segments=segments, bias=bias),
            (x, branch),
        ),
        "norm of x and a branch under drop path": (
            lambda x, b: residual_norm(x, b, segments=segments, bias=bias, factors=factors),
            (x, branch),
        ),
        "matrices": (stack, layer.tensors),
    }


@pytest.mark.parametrize("name", [*operators(), *partial_operators()])
def test_gradients_to_be_differentiated_again_are_the_usual_ones(name):
    """Other code computes them, and a penalty on gradients is to be one on those of training."""
    function, tensors = (operators() | partial_operators())[name][:2]
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.randn_like(output) for output in outputs]
    usual, again = (
        torch.autograd.grad(outputs, tensors, grads, retain_graph=True, create_graph=create)
        for create in (False, True)
    )
    torch.testing.assert_close(again, usual, rtol=1e-10, atol=1e-12)


def test_a_bias_for_the_next_operator_has_its_gradient_when_composed_too(monkeypatch):
    function, tensors = partial_operators()["linear, bias later"]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    grad = torch.randn_like(function(*tensors))
    found = []
    for composes in (False, True):
        monkeypatch.setattr(composed, "is_composed", lambda composes=composes: composes)
        y = function(*tensors)
        found.append([y, *torch.autograd.grad(y, tensors, grad)])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("composes", [False, True])
def test_sums_with_a_bias_and_norms_are_not_rounded_to_half_precision(composes, monkeypatch):
    """The result is, and has the dtype of the features: small differences are still seen."""
    monkeypatch.setattr(composed, "is_composed", lambda: composes)
    x = torch.zeros(2, 32, dtype=torch.bfloat16)
    x[:, :4] = 1
    found = OcticGELU()(x, torch.full((4,), 2**-10 - 1))
    exact = OcticGELU()(torch.where(x > 0, 2**-10, 0.0).double())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-9)
    segments, x = OcticLayerNorm(32).segments, torch.randn(5, 32).bfloat16() + 30
    found, exact = (irrep_norm(each, segments=segments) for each in (x, x.double()))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-3)


def test_a_program_exported_with_gradients_can_be_trained(net, images):
    program = torch.export.export(net, (images,)).module()
    net.zero_grad()
    net(images).square().sum().backward()
    program(images).square().sum().backward()
    expected = dict(net.named_parameters())
    found = {name: p.grad for name, p in program.named_parameters() if p.grad is not None}
    assert found
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name].grad, rtol=1e-9, atol=1e-10)


def test_no_images_give_no_logits(net, images):
    assert net(images[:0]).shape == (0, 3)
    assert net.features(images[:0])[-1].cls.shape == (0, 32)
