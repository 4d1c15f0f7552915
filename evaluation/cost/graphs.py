"""Record a step once as a CUDA graph and replay it as a whole, without launches by the host.

Memory that the step allocates and frees stays reserved for replays until the recording is deleted;
torch counts it as allocated only during the recording.
"""

import functools
import gc
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from utils.errors import UserError
from utils.mistakes import is_short_of_memory

# Steps before the recording, in which kernels are compiled and chosen, and workspaces allocated.
WARMUP = 3


class Recording(NamedTuple):
    """A captured step, which keeps its tensors alive."""

    graph: torch.cuda.CUDAGraph
    step: Callable[[], Tensor]  # keeps alive what the graph writes to, such as optimiser state
    output: Tensor  # of the step, overwritten by every replay
    grown_bytes: int  # peak memory during the step, above what was held before it


def record(step: Callable[[], Tensor], device: torch.device) -> Recording:
    """Run `step` a few times, then capture it, which executes nothing, and return the recording.

    The step must not wait for the device, and must leave no gradients. UserError for a step that
    cannot be captured, torch.OutOfMemoryError if memory is short.
    """
    stream = _side_stream(device)
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    # One stream for both, so that libraries' workspaces are not allocated in the graph's memory.
    # The outer context restores the stream even if a failing capture does not.
    with torch.cuda.device(device), torch.cuda.stream(stream), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*constructed with capturable=True")
        for _ in range(WARMUP):
            step()
        torch.cuda.synchronize(device)
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        output = _capture(graph, step, stream)
        grown = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.synchronize(device)
    return Recording(graph, step, output, grown)


def _capture(
    graph: torch.cuda.CUDAGraph, step: Callable[[], Tensor], stream: torch.cuda.Stream
) -> Tensor:
    try:
        with torch.cuda.graph(graph, stream=stream):
            output = step()
        return output
    except RuntimeError as error:
        short, said = _what_broke(error)
    # Outside the handler: the traceback would keep the tensors of the step alive.
    if short:
        raise torch.OutOfMemoryError(f"CUDA out of memory in a capture: {said}")
    raise UserError(f"cannot be captured as a CUDA graph ({said}); measure it without --graphs")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory was short, on the device or the host."""
    if is_short_of_memory(error) or isinstance(error, MemoryError):
        return True
    return any(words in str(error) for words in ("out of memory", "allocate memory"))


def _what_broke(error: BaseException) -> tuple[bool, str]:
    """Whether memory was short, and the first error's message, which the capture's end hides."""
    short = is_out_of_memory(error)
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
        short = short or is_out_of_memory(error)
    return short, " ".join(str(error).split("\n")[0].split()) or type(error).__name__


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # One for all nets, as each stream has its own workspaces, which count as memory.
    return torch.cuda.Stream(device)
