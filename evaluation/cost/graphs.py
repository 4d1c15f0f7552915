"""A step recorded once as a CUDA graph, to be replayed whole: the host launches nothing between.

Memory that a recorded step takes and gives back stays reserved for its replays until the recording
is gone; torch counts it as allocated only while the step is recorded.
"""

import functools
import gc
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from utils.errors import UserError

# Steps before the recording: kernels are compiled and chosen, and libraries take their workspaces.
WARMUP = 3


class Recording(NamedTuple):
    """A captured step; its tensors live as long as this does."""

    graph: torch.cuda.CUDAGraph
    step: Callable[[], Tensor]  # holds what the graph writes to, such as an optimiser's state
    output: Tensor  # of the step, written anew by every replay
    grown_bytes: int  # most that was held during the step, beyond what was held before it


def record(step: Callable[[], Tensor], device: torch.device) -> Recording:
    """Run `step` a few times, then capture it, which runs nothing; returns its static output.

    The step may not wait for the device, and must leave no gradients. Raises UserError for a step
    that cannot be captured, torch.OutOfMemoryError where memory is short.
    """
    stream = _side_stream(device)
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    # One stream for both, so that the workspaces of its libraries are not in the graph's memory.
    # The outer context leaves the stream even where a failing capture does not.
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
    """Whether an error says that memory was short, on the device or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The last is what CUDA's libraries say, which take memory of their own.
    said = ("out of memory", "allocate memory", "_STATUS_ALLOC_FAILED")
    return any(words in str(error) for words in said)


def _what_broke(error: BaseException) -> tuple[bool, str]:
    """Whether memory was short, and what the first error said: the end of a capture hides it."""
    short = is_out_of_memory(error)
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
        short = short or is_out_of_memory(error)
    return short, " ".join(str(error).split("\n")[0].split()) or type(error).__name__


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # One for all nets, as each stream has workspaces of its own, which count as memory.
    return torch.cuda.Stream(device)
