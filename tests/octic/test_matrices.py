"""Matrices of several layers at once, as a GPU makes them, are those of each layer alone."""

from functools import partial

import pytest
import torch

from octic import matrices
from octic.layer_tensors import Matrices, Sources
from octic.matrices import plain_stack, plain_unstack, stack_matrices
from tests.octic.kernel_cases import matrix_sources

KINDS = [(True, True), (False, False), (False, True), (True, False)]
TRAINED = [  # which of the four layers are
    (True, True, True, True),
    (False, False, False, False),
    (False, True, False, True),
    (True, False, False, True),
]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Layers are made by the operator; it runs PyTorch's own operators here."""
    monkeypatch.setattr(matrices, "takes_triton", lambda x: True)


def layers_of(trained: tuple[bool, ...], dtype: torch.dtype = torch.float64) -> list[Sources]:
    """One layer of each kind, some of them frozen, and each of its own width."""
    layers = []
    for index, ((scaled, biased), own) in enumerate(zip(KINDS, trained, strict=True)):
        layer = matrix_sources(scaled=scaled, biased=biased, wanted=3 + index, dtype=dtype)
        for tensor in layer.tensors:
            tensor.requires_grad_(own)
        layers.append(layer)
    return layers


def parts_of(found: list[Matrices]) -> list[torch.Tensor | None]:
    return [part for own in found for part in own]


@pytest.mark.parametrize("trained", TRAINED)
def test_trained_and_frozen_layers_come_in_the_order_they_were_given(trained):
    """With the values and the gradients of each alone; what is frozen asks for none."""
    layers = layers_of(trained)
    leaves = [t for layer in layers for t in layer.tensors if t.requires_grad]
    found, expected = stack_matrices(layers), [plain_stack(layer, None) for layer in layers]
    for own, ours, reference in zip(trained, found, expected, strict=True):
        for part, exact in zip(ours, reference, strict=True):
            assert (part is None) == (exact is None)
            if part is not None:
                torch.testing.assert_close(part, exact, rtol=1e-12, atol=1e-12)
                assert part.requires_grad == own
    if leaves:
        grads = [
            torch.autograd.grad(
                sum(part.square().sum() for part in parts_of(kind) if part is not None), leaves
            )
            for kind in (found, expected)
        ]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("only", ["weight", "bias", "factor"])
def test_a_layer_of_which_a_part_is_trained_gets_its_gradient(only):
    layer = matrix_sources(scaled=True, biased=True, dtype=torch.float64)
    part = {"weight": layer.weights[-1], "bias": layer.bias, "factor": layer.factors[0]}[only]
    part.requires_grad_()
    grads = []
    for make in (stack_matrices, lambda layers: [plain_stack(own, None) for own in layers]):
        outputs = parts_of(make([layer]))
        (grad,) = torch.autograd.grad(sum(out.square().sum() for out in outputs), part)
        grads.append(grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_without_gradients_none_are_prepared():
    layers = layers_of(TRAINED[0])
    with torch.no_grad():
        found = stack_matrices(layers)
    assert not any(part.requires_grad for part in parts_of(found) if part is not None)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_matrices_have_the_dtype_that_is_asked_for_and_gradients_their_tensors(dtype):
    """The parameters' own where none is asked for."""
    layers = layers_of(TRAINED[0], torch.float32)
    found = [part for part in parts_of(stack_matrices(layers, dtype=dtype)) if part is not None]
    assert {part.dtype for part in found} == {dtype or torch.float32}
    sum(part.float().square().sum() for part in found).backward()
    assert {t.grad.dtype for layer in layers for t in layer.tensors} == {torch.float32}


def test_gradients_in_half_precision_are_those_of_tensors_in_any():
    """Each in the dtype of its tensor, which autograd would cast and an operator must keep."""
    layer = matrix_sources(scaled=True, biased=True)
    half = partial(torch.Tensor.to, dtype=torch.bfloat16)
    layer = Sources([half(t) for t in layer.weights], half(layer.bias), layer.factors, layer.lines)
    found = plain_unstack(plain_stack(layer, torch.bfloat16), layer)
    assert [t.dtype for t in found] == [t.dtype for t in layer.tensors]
    mixed = Sources(layer.weights, layer.bias, [half(t) for t in layer.factors], layer.lines)
    grads = plain_stack(mixed, torch.float32)
    found = plain_unstack(grads, mixed)
    assert [t.dtype for t in found] == [t.dtype for t in mixed.tensors]


def test_matrices_by_the_operator_are_those_of_torch():
    """Values and gradients of what CUDA takes, on the device at hand; several layers at once."""
    kinds = [(True, True), (False, False), (False, True), (True, False)]
    layers = [
        matrix_sources(scaled=scaled, biased=biased, dtype=torch.float64)
        for scaled, biased in kinds
    ]
    tensors, layout = [t for layer in layers for t in layer.tensors], matrices._layout(layers)

    def plain(*tensors):
        found = [matrices.plain_stack(own, None) for own in matrices.layers_of(tensors, layout)]
        return [part for own in found for part in own if part is not None]

    def by_operator(*tensors):
        return matrices._Stack.apply(layout, torch.float64, *tensors)

    found = []
    for function in (plain, by_operator):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        outputs = function(*leaves)
        sum(part.square().sum() for part in outputs).backward()
        found.append([*outputs, *(leaf.grad for leaf in leaves)])
    assert all(torch.allclose(*pair) for pair in zip(*found, strict=True))
