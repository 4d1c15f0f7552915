"""The operators of `octic` composed of PyTorch's own, for what our operators cannot do.

Ours have a first derivative in reverse mode only, and run only where the package octic is
installed. `torch.func` (per-sample gradients, Jacobians, ensembles), second derivatives and
`torch.export` need PyTorch's operators instead: slower, and with more memory for the backward pass.
Nothing is changed in place. Letters as in `octic.irrep_norm` and `octic.irrep_linear`.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from octic.plain_kernels import Matrix, by_segment, with_bias
from vit.backbone import is_exporting


def is_composed() -> bool:
    """Whether this call must use the functions below: under `torch.export` or `torch.func`."""
    if is_exporting():
        return True
    # torch.autograd.Function refuses on the same condition.
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_differentiated_again() -> bool:
    """Whether the running backward pass was started with `create_graph=True`."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gradients(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    grads: Tensor | Sequence[Tensor],
) -> list[Tensor | None]:
    """Differentiable gradients of function(*inputs): one per input, None where not `wanted`."""
    outputs, pairs = function(*inputs), list(zip(inputs, wanted, strict=True))
    chosen = [part for part, needed in pairs if needed and part is not None]
    found = iter(torch.autograd.grad(outputs, chosen, grads, create_graph=True, allow_unused=True))
    return [next(found) if needed and part is not None else None for part, needed in pairs]


def linear(
    x: Tensor, lines: Tensor, plane: Tensor | None, bias: Tensor | None, *, add_bias: bool = True
) -> Tensor:
    """Compute `irrep_linear` of x [... D]; tensors have one dtype."""
    count, channels = lines.shape[0], lines.shape[-1]
    first = x[..., : count * channels].unflatten(-1, (count, channels))
    parts = [torch.einsum("...lc,ldc->...ld", first, lines).flatten(-2)]
    if plane is not None:
        rows = x[..., count * channels :].unflatten(-1, (-1, plane.shape[-1]))
        parts.append((rows @ plane.mT).flatten(-2))
    y = torch.cat(parts, dim=-1)
    if bias is not None:
        # Without add_bias: zero in value, but the bias still gets its gradient.
        y = with_bias(y, bias if add_bias else bias - bias.detach())
    return y


def norm(
    x: Tensor,
    scales: Sequence[Tensor],
    shift: Tensor | None,
    lengths: Sequence[int],
    weights: Sequence[float],
    shared: Sequence[int],
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Compute `irrep_norm` of x [... D]."""
    wide, order = x.to(torch.promote_types(x.dtype, torch.float32)), sum(lengths)
    channels, start = x.shape[-1] // order, 0
    centred, variances = [], []
    for (length, weight), equal in groupby(zip(lengths, weights, strict=True)):
        count, width = len(list(equal)), length * channels
        part = wide[..., start : start + count * width].unflatten(-1, (count, width))
        part = part - part.mean(-1, keepdim=True)
        centred.append(part.flatten(-2))
        variances.append(part.square().sum((-2, -1)) * (weight / width))
        start += count * width
    variance = torch.stack(variances).sum(0) + eps
    y = torch.cat(centred, -1) * (variance / order).rsqrt()[..., None]
    if scales:
        y = y * by_segment(scales, shared).to(y.dtype)
    return with_bias(y, shift).to(dtype)


def gelu(x: Tensor, bias: Tensor | None, transform: Matrix) -> Tensor:
    """Compute `regular_gelu` of x [... D]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    back = torch.tensor(transform, dtype=wide, device=x.device)
    copies = with_bias(x.to(wide), bias).unflatten(-1, (len(transform), -1))
    return (back @ F.gelu(back.mT @ copies)).flatten(-2).to(x.dtype)
