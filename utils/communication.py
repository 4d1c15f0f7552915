"""What ranks send each other: bytes by collective, counted as the calls pass, and by formula.

The *payload* of a collective is its larger side (what is gathered, what is reduced). What one rank
sends depends on the algorithm; for the ring, which NCCL takes for large messages, see `sent_bytes`.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "broadcast_": "broadcast",
}


class Message(NamedTuple):
    """One collective as this rank saw it: payload in bytes."""

    kind: str
    dtype: torch.dtype
    payload: int


class Communication(TorchDispatchMode):
    """Inside a `with` block, notes every collective of more than one rank in `messages`.

    Of the thread it is entered in: on the CPU the backward pass is in it too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note a collective and let it pass."""
        if func.namespace == "c10d":
            kind = KINDS.get(func.name().partition("::")[2].partition(".")[0])
            if kind:
                self._note(kind, args)
        return func(*args, **(kwargs or {}))

    def payload(self, kind: str) -> int:
        """Bytes of all collectives of a kind."""
        return sum(message.payload for message in self.messages if message.kind == kind)

    def _note(self, kind: str, args: tuple[Any, ...]) -> None:
        groups = [a for a in args if isinstance(a, torch.ScriptObject)]
        ranks = next((size for size in map(_size, groups) if size), 1)
        if ranks == 1:
            return
        sides = [list(_tensors(a)) for a in args if isinstance(a, Tensor | list)]
        payload = max((sum(t.nbytes for t in side) for side in sides), default=0)
        dtype = next((t.dtype for side in sides for t in side), torch.uint8)
        self.messages.append(Message(kind, dtype, payload))


def sent_bytes(kind: str, payload: float, ranks: int) -> float:
    """What each of `ranks` sends in a ring for a collective of `payload` bytes.

    all_gather and reduce_scatter: (R - 1) / R of it; all_reduce, which is one after the other:
    twice that; broadcast: at most all of it.
    """
    share = (ranks - 1) / ranks
    return payload * {"all_reduce": 2 * share, "broadcast": 1.0 if ranks > 1 else 0.0}.get(
        kind, share
    )


class Part(NamedTuple):
    """One net of a recipe: what it holds, and whether it is trained or only run."""

    parameters: int
    trained: bool


def step_payload(
    parts: Iterable[Part], sharding: str, *, micro_batches: int = 1, width: int = 4
) -> dict[str, int]:
    """Payload in bytes of one optimiser step, by collective, with parameters of `width` bytes.

    Each part runs once per micro-batch.

    replicate: one all-reduce of the trained nets' gradients per step, in float32.
    shard:     per micro-batch an all-gather of the parameters for each forward pass and one for
               the backward pass, and a reduce-scatter of the gradients, in float32.
    hybrid:    as shard, among the processes of a node; and an all-reduce of each one's shard of the
               gradients over the nodes, per micro-batch (given here for the whole of it).
    """
    parts = list(parts)
    trained = sum(part.parameters for part in parts if part.trained)
    if sharding == "replicate":
        return {"all_gather": 0, "reduce_scatter": 0, "all_reduce": 4 * trained}
    runs = sum(part.parameters * (1 + part.trained) for part in parts)
    return {
        "all_gather": width * runs * micro_batches,
        "reduce_scatter": 4 * trained * micro_batches,
        "all_reduce": 4 * trained * micro_batches if sharding == "hybrid" else 0,
    }


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _size(value: Any) -> int:
    try:
        return int(ProcessGroup.unbox(value).size())
    except (RuntimeError, TypeError, ValueError):  # the operation to reduce by, not a group
        return 0
