"""From one weight per irrep to the matrices that `irrep_linear` takes: stacked, scaled and cast.

In PyTorch this takes some thirty short operators per block, forward and backward, and a GPU spends
more time on launching than on running them. On CUDA it is one operator (namespace `octic`) and one
Triton kernel (`triton_matrices`) each way, for any number of layers.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from octic.composed import gradients, is_composed, is_differentiated_again
from octic.device import runs_triton, takes_triton
from octic.layer_tensors import Matrices, Sources
from octic.operators import launch, multiplies_nothing, operator


def stack_matrices(
    layers: Sequence[Sources], *, dtype: torch.dtype | None = None
) -> list[Matrices]:
    """The matrices of each layer, in `dtype` if it is given.

    On a GPU this is one launch for all trained layers and one for all frozen ones: matrices that
    are made together also get their gradients together.
    """
    first = layers[0].weights[0]
    if not takes_triton(first) or is_composed():
        return [plain_stack(layer, dtype) for layer in layers]
    trained = [torch.is_grad_enabled() and _is_trained(layer) for layer in layers]
    found: dict[bool, Iterator[Tensor]] = {}
    for train in set(trained):
        alike = [layer for layer, own in zip(layers, trained, strict=True) if own == train]
        tensors, layout = [t for layer in alike for t in layer.tensors], _layout(alike)
        arguments = (layout, dtype or first.dtype)
        found[train] = iter(
            _Stack.apply(*arguments, *tensors) if train else _stack(tensors, *arguments)
        )
    return [_taken(layer, found[train]) for layer, train in zip(layers, trained, strict=True)]


def _is_trained(layer: Sources) -> bool:
    return any(tensor.requires_grad for tensor in layer.tensors)


def plain_stack(layer: Sources, dtype: torch.dtype | None) -> Matrices:
    """Compute a layer's matrices with PyTorch's operators."""
    weights, bias, factors, lines = layer
    stacked = torch.stack(list(weights[:lines]))
    plane = weights[lines] if len(weights) > lines else None
    if factors:
        stacked = stacked * torch.stack(list(factors[:lines])).unsqueeze(-1)
        bias = None if bias is None else bias * factors[0]
        plane = None if plane is None else plane * factors[lines].unsqueeze(-1)
    if dtype is None:
        return Matrices(stacked, plane, bias)
    plane, bias = (None if part is None else part.to(dtype) for part in (plane, bias))
    return Matrices(stacked.to(dtype), plane, bias)


def plain_unstack(grads: Matrices, layer: Sources) -> list[Tensor]:
    """Gradients of a layer's tensors, in their order, with PyTorch's operators."""
    weights, bias, factors, _ = layer
    of_weights = [*grads.lines.unbind(), *([] if grads.plane is None else [grads.plane])]
    pairs = list(zip(of_weights, weights, strict=True))
    beside = [] if bias is None or grads.bias is None else [(grads.bias, bias)]
    if not factors:
        return [g.to(t.dtype, copy=True) for g, t in [*pairs, *beside]]
    scaled = zip(of_weights, factors, weights, strict=True)
    d_weights = [(g * f.unsqueeze(-1)).to(w.dtype) for g, f, w in scaled]
    sums = [(g * w).sum(-1) for g, w in pairs]
    for g, b in beside:
        sums[0] = sums[0] + g * b
    d_bias = [(g * factors[0]).to(b.dtype) for g, b in beside]
    return [*d_weights, *d_bias, *(s.to(f.dtype) for s, f in zip(sums, factors, strict=True))]


# Operators take flat lists: all tensors, and a layout of four numbers per layer.


def _layout(layers: Iterable[Sources]) -> list[int]:
    numbers = []
    for weights, bias, factors, lines in layers:
        numbers += [lines, len(weights), int(bias is not None), len(factors)]
    return numbers


def layers_of(tensors: Sequence[Tensor], layout: Sequence[int]) -> list[Sources]:
    """The layers that were flattened into `tensors` and `layout`."""
    rest, found = iter(tensors), []
    for start in range(0, len(layout), 4):
        lines, count, biased, scaled = layout[start : start + 4]
        weights = list(islice(rest, count))
        bias = next(rest) if biased else None
        found.append(Sources(weights, bias, list(islice(rest, scaled)), lines))
    return found


def _taken(layer: Sources, found: Iterator[Tensor]) -> Matrices:
    """The next tensors as those of a layer."""
    lines = next(found)
    plane = next(found) if len(layer.weights) > layer.lines else None
    return Matrices(lines, plane, None if layer.bias is None else next(found))


@operator("stack_matrices(Tensor[] tensors, int[] layout, ScalarType dtype) -> Tensor[]")
def _stack(tensors: Sequence[Tensor], layout: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    layers = layers_of(tensors, layout)
    if not runs_triton(tensors[0]):
        found = [part for layer in layers for part in plain_stack(layer, dtype)]
        # An operator may not return what it was given.
        return [part.clone() for part in found if part is not None]
    return launch("triton_matrices.stack", tensors[0], layers, dtype)


@operator("stack_matrices_backward(Tensor[] grads, Tensor[] tensors, int[] layout) -> Tensor[]")
def _stack_backward(
    grads: Sequence[Tensor], tensors: Sequence[Tensor], layout: Sequence[int]
) -> list[Tensor]:
    layers, rest = layers_of(tensors, layout), iter(grads)
    pairs = [(_taken(layer, rest), layer) for layer in layers]
    if not runs_triton(tensors[0]):
        return [part for own, layer in pairs for part in plain_unstack(own, layer)]
    return launch("triton_matrices.unstack", tensors[0], pairs)


@torch.library.register_fake("octic::stack_matrices")
def _(tensors: Sequence[Tensor], layout: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    found = []
    for weights, bias, _, lines in layers_of(tensors, layout):
        found.append(weights[0].new_empty((lines, *weights[0].shape), dtype=dtype))
        rest = [*weights[lines:], *([] if bias is None else [bias])]
        found += [part.new_empty(part.shape, dtype=dtype) for part in rest]
    return found


@torch.library.register_fake("octic::stack_matrices_backward")
def _(grads: Sequence[Tensor], tensors: Sequence[Tensor], layout: Sequence[int]) -> list[Tensor]:
    return [part.new_empty(part.shape) for part in tensors]


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layout: list[int], dtype: torch.dtype, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.layout, ctx.dtype = layout, dtype
        return tuple(_stack(tensors, layout, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        if is_differentiated_again():

            def stack(*tensors: Tensor) -> list[Tensor]:
                layers = layers_of(tensors, ctx.layout)
                found = [part for layer in layers for part in plain_stack(layer, ctx.dtype)]
                return [part for part in found if part is not None]

            again = gradients(stack, ctx.saved_tensors, ctx.needs_input_grad[2:], grads)
            return None, None, *again
        return None, None, *_stack_backward(grads, ctx.saved_tensors, ctx.layout)


multiplies_nothing(torch.ops.octic.stack_matrices, torch.ops.octic.stack_matrices_backward)
