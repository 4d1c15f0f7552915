"""How a part of a recipe runs: FSDP2 on a (replicate, shard) mesh, compile, recomputation.

Replicated training is the mesh (world, 1), sharded training (1, world), hybrid training (nodes,
processes of a node): one mechanism, so that gradients are averaged during the backward pass in any
case. What a recipe does not wrap is averaged after it.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from utils import distributed, layout
from utils.errors import UserError
from utils.precision import Precision

Wrap = Callable[..., nn.Module]
SHARDINGS = ("replicate", "shard", "hybrid")
# FSDP2 warns when a module returns a view (backbones return slices of their tokens), because an
# in-place change of it would lose FSDP2's backward hooks. Nothing here changes one in place, and
# tests compare gradients of several processes with those of one (tests/utils/test_training.py,
# tests/utils/checkpoints/test_sharding.py).
VIEW_RETURNED = r"FSDP2-wrapped module \(.*\) returned a view tensor"


def check_sharding(sharding: str) -> None:
    """UserError for a name that no way of sharding has."""
    if sharding not in SHARDINGS:
        raise UserError(f"training.sharding={sharding} is unknown; choose {', '.join(SHARDINGS)}")


def make_wrap(
    device: torch.device,
    precision: Precision,
    *,
    sharding: str = "replicate",
    compile: bool = False,
    activation_checkpointing: bool = False,
) -> Wrap:
    """Return `wrap(module, units=(), methods=("encode", "features"))`.

    It changes `module` in place and returns it. `units` are the repeated parts (blocks), each
    recomputed, compiled and sharded on its own; a module without units is one unit. `methods` are
    entry points besides `forward`. Parameter names do not change. A single process shards nothing.
    Every rank must call `wrap` in the same order.
    """
    mesh = make_mesh(device, sharding)
    if mesh is not None:
        warnings.filterwarnings("ignore", VIEW_RETURNED, UserWarning)
    # bf16 copies only where parameters travel (sharded); replicated ranks compute exactly as one
    # process does. Reductions are float32 in either case.
    policy = MixedPrecisionPolicy(
        param_dtype=precision.dtype
        if sharding != "replicate" and precision.dtype is torch.bfloat16
        else None,
        reduce_dtype=torch.float32 if precision.dtype is not None else None,
        cast_forward_inputs=False,  # autocast casts where a product wants it
    )

    def wrap(
        module: nn.Module,
        units: Iterable[nn.Module] = (),
        methods: Iterable[str] = ("encode", "features"),
    ) -> nn.Module:
        units = list(units)
        for unit in units or [module]:
            if activation_checkpointing and units:
                _recompute(unit)
            if compile:
                allow_variants()
                unit.compile()
        if mesh is not None and list(module.parameters()):
            for unit in units:
                fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
            # Reshard the root too, which FSDP2 keeps gathered by default: a teacher never runs
            # backward, and an EMA must update the sharded parameters, not the gathered copy.
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
            cast(Any, module).travels_in = policy.param_dtype  # probes cannot have it finer
            for method in methods:
                if hasattr(module, method):
                    register_fsdp_forward_method(module, method)
        return module

    return wrap


def allow_variants() -> None:
    """Raise torch's limit of 8 compiled variants per function to 64.

    All blocks share one `forward`, which is compiled per kind of block, place, mode and shapes.
    """
    import torch._dynamo

    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 64)


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network of ours, or of a timm network in its adapter; or none."""
    return list(getattr(net, "blocks", getattr(getattr(net, "net", None), "blocks", ())))


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a nest of dicts, lists and tuples, without waiting for it."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [to_device(value, device) for value in batch]
    return batch


def make_mesh(device: torch.device, sharding: str) -> DeviceMesh | None:
    """The (replicate, shard) mesh over all ranks, or None in one process."""
    world = distributed.world_size()
    check_sharding(sharding)
    if world == 1:
        return None
    own = {"replicate": 1, "shard": world}.get(sharding) or distributed.node_size()
    shape = (world // own, own)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def broadcast_state(module: nn.Module) -> None:
    """Give every rank rank 0's parameters and buffers; call it before wrapping, on every rank."""
    if distributed.world_size() > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), src=0)


class Gradients:
    """Controls when gradients are reduced, and averages those of parameters that nobody wrapped.

    Modules and parameters are looked up once, as walking all modules costs milliseconds per step.
    In one process there is nothing to do.
    """

    def __init__(self, module: nn.Module) -> None:
        self._wrapped: list[FSDPModule] = []
        self._loose: list[nn.Parameter] = []
        self._sharded = False
        if distributed.world_size() > 1:
            parameters = list(module.parameters())
            self._wrapped = [part for part in module.modules() if isinstance(part, FSDPModule)]
            self._loose = [p for p in parameters if not isinstance(p, DTensor)]
            self._sharded = any(layout.shard_group(p) is not None for p in parameters)

    def set_sync(self, on: bool) -> None:
        """Reduce gradients in the coming backward pass, or only accumulate them.

        Sharded gradients are always reduced: holding them whole would cost what the sharding saved.
        """
        for part in self._wrapped:
            part.set_requires_gradient_sync(on or self._sharded, recurse=False)

    def finish(self) -> None:
        """Free gathered copies, average the gradients nobody wrapped; every rank must call this."""
        for part in self._wrapped:
            part.reshard()
        loose = [p for p in self._loose if p.requires_grad]
        if not loose:
            return
        # A parameter without a gradient here may have one on another rank.
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in loose]
        )
        used = torch.tensor(
            [p.grad is not None for p in loose], device=flat.device, dtype=torch.float32
        )
        flat = distributed.all_reduce_mean(torch.cat([flat, used]))
        pieces = flat[: -len(loose)].split([p.numel() for p in loose])
        counts = flat[-len(loose) :].tolist()
        for parameter, piece, count in zip(loose, pieces, counts, strict=True):
            parameter.grad = piece.view_as(parameter).to(parameter.dtype) if count else None


def _recompute(unit: nn.Module) -> None:
    # In place rather than by a wrapper module, so that types and parameter names stay.
    forward = unit.forward

    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    unit.forward = recomputed
