"""Compare the costs of blocks: operators, compiled kernels, and bytes kept for backward.

The first block of each kind in a net with `blocks` is measured: of a hybrid net, an octic and a
plain block of the same width.
"""

import re
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evaluation.cost.models import find_backbone, make_net
from evaluation.progress import say
from evaluation.results import print_table
from utils.errors import UserError, one_line
from utils.flops import count_operations
from utils.parallel import blocks_of

# A call in the code that Inductor writes: a kernel of its own, or an operator.
CALL = re.compile(r"^\s+(?:\w+ = )?((?:cpp_|triton_|extern_kernels\.|torch\.ops\.)[\w.]+)\(", re.M)
# Lines, planes and bias of an equivariant linear layer.
LAUNCHES = {"torch.ops.octic.irrep_linear.default": 3}


class BlockCost(NamedTuple):
    """One block, for one image."""

    kind: str  # class of the block
    width: int
    tokens: int
    multiply_adds: int
    operators: int  # of the forward pass, without views
    operators_back: int
    kept_bytes: int  # of an image, until the backward pass
    kernels: int | None  # of the compiled forward pass, with products in libraries


def measure(
    names: list[str], *, size: int = 224, bf16: bool = True, kernels: bool = False
) -> dict[str, list[BlockCost]]:
    """Costs of the kinds of blocks of registered nets, printed as a table.

    bf16: under autocast to bfloat16, as on a GPU. kernels: compile each block for this CPU (about a
    minute each; needs a C++ compiler). Raises UserError for a net without `blocks` of tokens. The
    nets before it, and those before an interrupt, are printed all the same.
    """
    found = {}
    try:
        for name in names:
            say(f"blocks of {name}")
            net = make_net(name, find_backbone(name, size=size), "cpu", seed=0)
            kinds, shape = kinds_of(name, net), shape_of(name, net, size)
            costs = [cost_of_block(kind, *shape, bf16=bf16, kernels=kernels) for kind in kinds]
            found[name] = costs
    finally:
        if found:
            _print(found, size, bf16, kernels)
    return found


def cost_of_block(
    block: nn.Module, tokens: int, width: int, *, bf16: bool = True, kernels: bool = False
) -> BlockCost:
    """Count one block on tokens [1 T D]."""
    block.train()
    tokens_in = torch.randn(1, tokens, width)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        # The bytes for two images minus those for one, as copies of weights are no activations.
        kept = kept_bytes(block, tokens_in.expand(2, -1, -1)) - kept_bytes(block, tokens_in)
        compiled = count_kernels(block, tokens_in) if kernels else None
        with torch.random.fork_rng():
            counted = count_operations(block, tokens_in.requires_grad_(), loss=_loss)
    return BlockCost(
        type(block).__name__,
        width,
        tokens,
        counted.forward // 2,
        counted.forward_calls,
        counted.backward_calls,
        kept,
        compiled,
    )


def _loss(output: Any) -> Tensor:
    """Of a block's tokens, which some return beside other things."""
    tokens = output if isinstance(output, Tensor) else output[0]
    return tokens.float().square().mean()


def kept_bytes(block: nn.Module, x: Tensor) -> int:
    """Bytes kept for the backward pass, each storage counted once, without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: dict[int, int] = {}
    alive = []  # keeps tensors, as a reused address would be counted once for two tensors

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(x)
    return sum(kept.values())


def count_kernels(block: nn.Module, x: Tensor) -> int:
    """Kernels of the compiled forward pass: generated ones, and those of the operators called."""
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    with torch.no_grad():
        _, code = run_and_get_code(torch.compile(block, fullgraph=True), x)
    calls = [call for text in code for call in CALL.findall(text.partition("def call(")[2])]
    return sum(LAUNCHES.get(call, 1) for call in calls)


def kinds_of(name: str, net: nn.Module) -> list[nn.Module]:
    """The first block of each kind; UserError for a net without `blocks`."""
    blocks = blocks_of(net)
    if not blocks:
        raise UserError(f"{name} has no `blocks` that could be compared")
    return list({type(block): block for block in reversed(blocks)}.values())[::-1]


class _Reached(Exception):
    """The first block was called, with these shapes."""


def shape_of(name: str, net: nn.Module, size: int) -> tuple[int, int]:
    """Tokens of an image and their width, as the first block gets them.

    UserError where it gets something else than tokens [1 T D], or more than those, and for a size
    that the net does not take.
    """
    first = blocks_of(net)[0]

    def stop(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        raise _Reached(*(tuple(value.shape) for value in inputs[:1]))

    shape: tuple[int, ...] = ()
    images = torch.zeros(1, getattr(net, "in_chans", 3), size, size)
    hook = first.register_forward_pre_hook(stop)
    try:
        with torch.no_grad():
            net.eval()(images)
    except _Reached as reached:
        (shape,) = reached.args
    except (ValueError, AssertionError) as error:  # the latter are timm's
        raise UserError(f"{name} does not take {size} x {size} pixels: {one_line(error)}") from None
    finally:
        hook.remove()
    needed = [p for p in signature(first.forward).parameters.values() if p.default is p.empty]
    if len(shape) != 3 or len(needed) > 1:
        raise UserError(f"the blocks of {name} do not take tokens [B T D] alone: none is measured")
    return shape[1], shape[2]


def _print(found: dict[str, list[BlockCost]], size: int, bf16: bool, kernels: bool) -> None:
    rows = []
    for name, costs in found.items():
        reference = costs[-1]
        for cost in costs:
            rows.append(
                [
                    name if cost is costs[0] else "",
                    cost.kind,
                    cost.width,
                    f"{cost.multiply_adds / 1e9:.3f}",
                    cost.operators,
                    cost.operators_back,
                    *([cost.kernels] if kernels else []),
                    f"{cost.kept_bytes / 2**20:.2f}",
                    f"{cost.kept_bytes / reference.kept_bytes:.2f}",
                ]
            )
    columns = ["model", "block", "width", "multiply-adds\n10^9", "operators\nforward"]
    columns += ["operators\nbackward", *(["kernels\ncompiled"] if kernels else [])]
    columns += ["kept for\nbackward MiB", "times the\nlast block's"]
    arithmetic = "autocast to bfloat16" if bf16 else "float32"
    protocol = (
        f"one image of {size} x {size} pixels, {arithmetic}, training mode, views not counted"
    )
    print_table("cost of a block", columns, rows, protocol=f"{protocol}; torch {torch.__version__}")
