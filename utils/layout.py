"""How tensors that may be sharded lie on the ranks: their whole, a rank's part, who writes what."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from utils import distributed


def whole(tensor: Tensor) -> Tensor:
    """The full tensor behind a sharded one, as is otherwise; every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_main(tensor: Tensor) -> Tensor:
    """The whole tensor on rank 0's CPU, an empty one on the others; every rank must call this."""
    full = whole(tensor)
    return full.cpu() if distributed.is_main() else full.new_empty(0, device="cpu")


def shard_like(full: Tensor, target: Any) -> Tensor:
    """This rank's part of `full`, laid out as `target` is; no communication."""
    if not isinstance(target, DTensor) or full.shape != target.shape or isinstance(full, DTensor):
        return full
    full = full.to(target.device)
    return distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)


def written_here(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of tensors alike on all ranks, those this one writes to a checkpoint; no communication.

    Its shards, its share of what several ranks hold alike, and on rank 0 what is not laid out.
    """
    mine: dict[str, Tensor] = {}
    loads: dict[int, list[int]] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            if distributed.is_main():
                mine[name] = tensor
            continue
        place = tensor.device_mesh.get_coordinate()
        index, copies = 0, 1
        for dim, placement in enumerate(tensor.placements):
            if not placement.is_shard():
                size = tensor.device_mesh.size(dim)
                index, copies = index * size + (place[dim] if place else 0), copies * size
        load = loads.setdefault(copies, [0] * copies)
        writer = load.index(min(load))
        load[writer] += tensor.numel()
        if index == writer and tensor.to_local().numel():
            mine[name] = tensor
    return mine


def local(tensor: Tensor) -> Tensor:
    """This rank's storage of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_group(tensor: Tensor) -> dist.ProcessGroup | None:
    """The ranks that together hold a sharded tensor, None if this rank holds all of it."""
    if not isinstance(tensor, DTensor) or tensor.device_mesh["shard"].size() == 1:
        return None
    return tensor.device_mesh.get_group("shard")
