"""Random number generators: seeding them, keeping their states, shielding them from others."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """States of all generators as plain values and tensors, readable with `weights_only=True`."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # a tuple
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys, np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "python": [version, list(numbers), gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


def seed_cpu(seed: int) -> None:
    """Seed the global CPU generators of Python, NumPy and torch; those of GPUs stay as they are."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Restore the generators of CPU and GPU afterwards (a probe must not change the training)."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


@contextmanager
def preserved_cpu_randomness() -> Iterator[None]:
    """Restore the CPU's generators afterwards; cheaper, as no GPU is asked for its state."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


class ShieldedBatches:
    """Batches whose loader cannot disturb the network's random numbers; measures the waiting time.

    A DataLoader draws a base seed when it starts, and without workers it seeds the main process. A
    resumed run would do this at other steps, so its drop path would differ from an unbroken run.
    """

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches
        self.seconds = 0.0

    def waited(self) -> float:
        """Seconds spent waiting for batches since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    @property
    def unread(self) -> int:
        """Images so far that could not be read, where the batches count `errors`."""
        return sum(getattr(self.batches, "errors", {}).values())

    def __iter__(self) -> "ShieldedBatches":
        return self

    def __next__(self) -> Any:
        """The next batch; the CPU's generators stay as they are."""
        start = time.perf_counter()
        try:
            with preserved_cpu_randomness():
                return next(self.batches)
        finally:
            self.seconds += time.perf_counter() - start
