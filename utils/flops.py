"""Floating-point operations of a net by torch's counter, with nothing left out in silence.

What counts is the arithmetic of matrix products, convolutions and attention, two operations for a
multiply-add; elementwise work, norms, softmax and moving of data count nothing, as usual for ViTs.
Works on any device, on `meta` without memory or time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from utils.errors import UserError

aten = torch.ops.aten

# Operators without arithmetic of the kinds above that carry no tag which says so, by their name
# without leading and trailing underscores and without `_backward`.
_MOVES = (
    *("unsafe_view", "reshape_alias", "copy", "to_copy", "cat", "stack", "constant_pad_nd", "pad"),
    *("reflection_pad2d", "replication_pad2d", "roll", "flip", "rot90", "repeat", "tril", "triu"),
    *("repeat_interleave", "slice", "select", "unfold", "diagonal", "as_strided", "slice_scatter"),
    *("select_scatter", "as_strided_scatter", "im2col", "col2im", "pixel_shuffle", "resize"),
    *("pixel_unshuffle", "channel_shuffle", "lift_fresh", "local_scalar_dense", "set", "fill"),
    *("zero", "masked_fill", "where", "unsafe_split", "unsafe_split_with_sizes"),
)
_FACTORIES = (
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "new_zeros"),
    *("new_ones", "new_full", "zeros", "zeros_like", "ones", "ones_like", "full", "full_like"),
    *("arange", "linspace", "scalar_tensor", "eye", "efficientzerotensor"),
)
_RANDOM = (
    *("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm"),
    *("bernoulli", "normal", "uniform", "native_dropout", "fused_dropout", "exponential"),
)
_INDEXING = (
    *("index", "index_put", "index_put_impl", "unsafe_index", "unsafe_index_put", "index_add"),
    *("index_select", "index_copy", "index_fill", "gather", "scatter", "scatter_add", "take"),
    *("scatter_reduce", "embedding", "embedding_dense", "sort", "topk", "argsort", "nonzero"),
    *("masked_select", "masked_scatter", "cumsum", "cumprod", "bincount", "unique2", "max", "min"),
    *("argmax", "argmin", "searchsorted", "bucketize", "value_selecting_reduction"),
)
_NORMS = (
    *("native_layer_norm", "native_batch_norm", "native_group_norm", "cudnn_batch_norm"),
    *("miopen_batch_norm", "native_batch_norm_legit", "native_batch_norm_legit_no_training"),
    *("native_batch_norm_legit_functional", "batch_norm_with_update", "fused_rms_norm"),
    *("var_mean", "std_mean", "linalg_vector_norm", "weight_norm_interface", "norm"),
    *("softmax", "softmax_data", "safe_softmax", "log_softmax", "log_softmax_data", "logsumexp"),
    *("nll_loss_forward", "nll_loss", "nll_loss2d_forward", "nll_loss2d", "binary_cross_entropy"),
)
_POOLING = (
    *("max_pool2d_with_indices", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
    *("upsample_bicubic2d", "upsample_bicubic2d_aa", "upsample_bilinear2d", "upsample_nearest2d"),
    *("upsample_bilinear2d_aa", "upsample_nearest_exact2d", "grid_sampler_2d"),
)
# Elementwise as well, though torch does not tag them so.
_POINTWISE = (
    *("hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu", "silu", "mish", "softplus"),
    *("glu", "log_sigmoid", "threshold", "prelu_kernel", "rrelu_with_noise", "gelu"),
    "floor_divide",
)
UNCOUNTED_BY_CONVENTION = frozenset(
    (*_MOVES, *_FACTORIES, *_RANDOM, *_INDEXING, *_NORMS, *_POOLING, *_POINTWISE)
)
_FREE_TAGS = {torch.Tag.pointwise, torch.Tag.reduction, torch.Tag.view_copy}


class Operations(NamedTuple):
    """What one pass did: floating-point operations (2 for a multiply-add), and operators."""

    forward: int
    backward: int
    forward_calls: int  # of operators that are no views
    backward_calls: int
    uncounted: tuple[str, ...]  # operators that may multiply and have no formula

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


def count_operations(
    run: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    backward: bool = True,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> Operations:
    """Run forward, and backward from the mean square of the output or `loss` of it, and count.

    Departs from torch's formulas: attention counts its products, two forward and four backward, on
    every device, because torch has none for the CPU's kernel and for others counts what they
    recompute; a convolution in groups counts backward what its forward pass says, where torch
    counts it as if it had no groups.
    """
    recorder = _Recorder()
    # The recorder outside: it sees the operators that the counter could not take apart.
    with torch.set_grad_enabled(backward), no_fast_path(), recorder:
        counter = FlopCounterMode(display=False, custom_mapping=_formulas())
        recorder.known = counter.flop_registry
        with counter:
            output = run(images)
            forward, forward_calls = counter.get_total_flops(), recorder.calls
            if backward:
                (loss(output) if loss else output.float().square().mean()).backward()
            total, calls = counter.get_total_flops(), recorder.calls
    return Operations(
        forward,
        total - forward,
        forward_calls,
        calls - forward_calls,
        tuple(sorted(recorder.uncounted)),
    )


def multiply_adds(net: nn.Module, size: int) -> int:
    """Multiply-adds of one square image of `size` pixels a side; UserError for a wrong size."""
    return count_one_image(net, size, backward=False).forward // 2


def count_one_image(net: nn.Module, size: int, *, backward: bool = True) -> Operations:
    """Operations for one square image, in eval mode; UserError for a size the net does not take."""
    channels = getattr(net, "in_chans", 3)
    device = next(net.parameters()).device
    images = torch.empty(1, channels, size, size, device=device)
    try:
        return count_operations(net.eval(), images, backward=backward)
    except (ValueError, AssertionError) as error:  # the latter are timm's
        raise UserError(f"the backbone does not take {size} x {size} pixels: {error}") from error


class _Recorder(TorchDispatchMode):
    """Notes every operator that runs, and which of them nobody accounts for."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[Any, Any] = {}
        self.calls = 0  # of operators that are no views
        self.uncounted: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet = getattr(func, "_overloadpacket", None)
        if packet is None:  # a higher-order operator: its parts run where no mode sees them
            self.uncounted.add(str(func))
        elif not func.is_view:
            self.calls += 1
            if packet not in self.known and not _multiplies_nothing(func):
                self.uncounted.add(str(packet))
        return func(*args, **(kwargs or {}))


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Keep torch's MultiheadAttention in one piece per product: its fused operator is opaque."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _multiplies_nothing(func: Any) -> bool:
    if _FREE_TAGS.intersection(func.tags) or func.namespace == "prim":
        return True
    name = func._schema.name.removeprefix("aten::").strip("_").replace("_backward", "")
    return func.namespace == "aten" and name in UNCOUNTED_BY_CONVENTION


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two products: each query with each key over channels, each weight with each value."""
    *heads, queries, channels = query
    return 2 * prod(heads) * queries * key[-2] * (channels + value[-1])


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two products for each one of the forward pass."""
    return 2 * _attention(query, key, value)


def _convolution_backward(grad: Any, images: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """As many products as forward for each of the two gradients that are asked for."""
    transposed, wanted = rest[4], rest[7]
    places = (images if transposed else grad)[2:]
    return 2 * grad[0] * prod(places) * prod(weight) * sum(wanted[:2])


def _formulas() -> dict[Any, Callable[..., int]]:
    """Formulas that torch lacks or has otherwise."""
    kernels = (
        *("flash_attention_for_cpu", "fused_attention_overrideable", "flash_attention"),
        *("efficient_attention", "cudnn_attention"),
    )
    names = [f"_scaled_dot_product_{kernel}" for kernel in kernels]
    formulas: dict[str, Callable[..., int]] = dict.fromkeys(names, _attention)
    formulas["_scaled_dot_product_attention_math_for_mps"] = _attention
    formulas |= {f"{name}_backward": _attention_backward for name in names}
    formulas |= {"mv": _with_vector, "dot": _with_vector, "vdot": _with_vector}
    formulas |= {"addmv": _added_matrix_vector, "_addmm_activation": _added_product}
    formulas["convolution_backward"] = _convolution_backward
    # Of every release of torch, those that it has.
    return {getattr(aten, name): f for name, f in formulas.items() if hasattr(aten, name)}


def _with_vector(first: Any, *_: Any, **__: Any) -> int:
    """A matrix, or a vector, times a vector."""
    return 2 * prod(first)


def _added_matrix_vector(start: Any, matrix: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


def _added_product(start: Any, first: Any, second: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(first) * second[-1]
