"""Ranks, and a few collectives; all of them also work in one process."""

import functools
import os
import socket
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import UserError


def joined() -> bool:
    """Whether this process has met its peers (`utils/joining.py`)."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Rank of this process, 0 when alone."""
    return dist.get_rank() if joined() else 0


def world_size() -> int:
    """Number of processes, 1 when alone."""
    return dist.get_world_size() if joined() else 1


def node_size() -> int:
    """Number of processes on each node; UserError if it differs. Every rank must call this."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    hosts = gather_objects((socket.gethostname(), int(here) if here.isdecimal() else 0))
    sizes = [told or sum(name == host for name, _ in hosts) for host, told in hosts]
    if len(set(sizes)) > 1 or len(sizes) % sizes[0]:
        raise UserError(
            f"training.sharding=hybrid needs as many processes on each node, not {sizes}; "
            "choose replicate or shard"
        )
    return sizes[0]


def is_main() -> bool:
    """Whether this process prints and writes files."""
    return rank() == 0


def barrier() -> None:
    """Wait for every rank."""
    if joined():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over the ranks, as a new tensor; every rank must call this."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean of `tensor` over the ranks, as a new tensor; every rank must call this."""
    return tensor if world_size() == 1 else all_reduce_sum(tensor) / world_size()


def average_buffers(buffers: Iterable[Tensor]) -> None:
    """Give floating-point buffers (batch statistics) their mean over the ranks.

    Every rank must call this. Each rank computed them from other images, and only rank 0's would be
    saved.
    """
    buffers = [b for b in buffers if b.is_floating_point()]
    if world_size() == 1 or not buffers:
        return
    # Wide enough for the widest: one in float64 would lose half of their digits in float32.
    dtype = functools.reduce(torch.promote_types, (b.dtype for b in buffers), torch.float32)
    mean = all_reduce_mean(torch.cat([buffer.flatten().to(dtype) for buffer in buffers]))
    parts = mean.split([buffer.numel() for buffer in buffers])
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.copy_(part.view_as(buffer))


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Elementwise maximum over the ranks, as a new tensor; every rank must call this."""
    if world_size() == 1:
        return tensor
    largest = tensor.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def all_gather_variable(tensor: Tensor) -> Tensor:
    """The ranks' tensors (first sizes may differ) concatenated; every rank must call this."""
    if world_size() == 1:
        return tensor
    sizes = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(tensor)], device=tensor.device))
    counts = [int(size) for size in sizes]
    padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_objects(value: Any) -> list[Any]:
    """The ranks' small Python values, in rank order, on every rank; every rank must call this."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's small Python value on every rank; every rank must call this."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def on_main(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0, which alone writes to a run's folder; every rank must call this.

    Every rank gets its small result, or the UserError or OSError that it raised.
    """
    result: Any = None
    if is_main():
        try:
            result = action()
        except (UserError, OSError) as error:
            result = error
    result = broadcast_object(result)
    if isinstance(result, UserError | OSError):
        raise result
    return result
