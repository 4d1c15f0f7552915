"""Images per second and peak memory of nets measured in turn, so that they share the weather.

A turn is one untimed step and some timed ones of one net; a round gives every net a turn. What
else the machine does meets all nets of a round alike, so ratios are taken round by round.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.cost.models import num_classes_of
from evaluation.cost.peaks import synchronize
from evaluation.progress import say, track

INFERENCE, TRAINING = "inference", "training step"
PASSES = (INFERENCE, TRAINING)
MIB = 2**20
Result = TypeVar("Result")


class Turn(NamedTuple):
    """Seconds of each timed step, and the peak of memory in bytes where the device tells it."""

    seconds: list[float]
    peak_bytes: int | None


class Speed(NamedTuple):
    """One net's speed in one pass over all rounds."""

    images_per_second: float  # over the time of all timed steps, as published
    slowest_round: float  # images per second
    fastest_round: float
    peak_mib: float | None


class Ratio(NamedTuple):
    """How many times as fast as its twin a net was: median, least and greatest of the rounds."""

    median: float
    least: float
    greatest: float


class Contestant:
    """A net with a batch of random images and labels, ready to be timed on their device.

    Random labels and cross-entropy for a classifier, else the mean square of the pooled feature;
    AdamW; autocast in `dtype`, if one is given.
    """

    def __init__(
        self,
        net: nn.Module,
        images: Tensor,
        *,
        dtype: torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        self.net, self.images, self.dtype = net, images, dtype
        self.run: Callable[[Tensor], Tensor] = torch.compile(net) if compile else net
        classes = num_classes_of(net)
        labels = torch.randint(max(classes, 1), (len(images),), device=images.device)
        self.labels = labels if classes else None

    def turn(self, kind: str, steps: int) -> Turn:
        """Take one untimed step and `steps` timed ones, each until the device is done."""
        device = self.images.device
        on_cuda = device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
            others = torch.cuda.memory_allocated(device) - self._own_bytes()
        seconds = []
        with self._stepping(kind) as step:
            for _ in range(1 + steps):
                synchronize(device)
                start = time.perf_counter()
                step()
                synchronize(device)
                seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated(device) - others if on_cuda else None
        return Turn(seconds[1:], peak)

    @contextmanager
    def _stepping(self, kind: str) -> Iterator[Callable[[], None]]:
        """A step of one pass; gradients and the optimiser's state are gone afterwards."""
        if kind == INFERENCE:
            self.net.eval()
            yield self._infer
            return
        self.net.train()
        trained = [p for p in self.net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5)
        try:
            yield lambda: self._train(optimizer)
        finally:
            optimizer.zero_grad(set_to_none=True)

    def _infer(self) -> None:
        with torch.no_grad(), self.autocast():
            self.run(self.images)

    def _train(self, optimizer: torch.optim.Optimizer) -> None:
        with self.autocast():
            loss = self.loss(self.run(self.images))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def loss(self, output: Tensor) -> Tensor:
        """Of a batch's output [B classes] or [B D]."""
        if self.labels is None:
            return output.float().square().mean()
        return F.cross_entropy(output.float(), self.labels)

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        enabled = self.dtype is not None
        return torch.autocast(self.images.device.type, dtype=self.dtype, enabled=enabled)

    def _own_bytes(self) -> int:
        parts = [*self.net.parameters(), *self.net.buffers(), self.images]
        return sum(part.numel() * part.element_size() for part in parts)


def measure_in_turn(
    contestants: Mapping[str, Contestant],
    kind: str,
    *,
    steps: int,
    rounds: int,
    warmup: int,
    shown: bool = True,
) -> tuple[dict[str, list[Turn]], list[str]]:
    """Turns of every net, one per round, and the names of those that ran out of memory.

    `steps` timed steps each in all, dealt out over `rounds`; before, `warmup` untimed ones.
    """
    racing = dict(contestants)
    turns: dict[str, list[Turn]] = {name: [] for name in contestants}
    lost: list[str] = []
    batch = len(next(iter(contestants.values())).images)
    shares = [steps // rounds + (index < steps % rounds) for index in range(rounds)]
    plan = [*([(0, warmup)] if warmup else []), *enumerate(shares, start=1)]
    label = f"{kind}s" if kind == TRAINING else kind
    schedule = [(name, index, share) for index, share in plan for name in contestants]
    for name, index, share in track(
        schedule,
        total=sum(1 + share for _, _, share in schedule) * batch,
        label=f"{label}, images",
        size=lambda entry: (1 + entry[2]) * batch,
        shown=shown,
    ):
        if name not in racing:
            continue
        turn = unless_out_of_memory(partial(racing[name].turn, kind, share))
        if turn is None:
            del racing[name]
            lost.append(name)
            if shown:
                say(f"{name}: out of memory in {kind} at batch {batch}; --batch-size N takes less")
        elif index:
            turns[name].append(turn)
    return {name: turns[name] for name in racing}, lost


def speed_of(turns: list[Turn], batch: int) -> Speed:
    """Images per second and peak memory over the turns of one net."""
    rates = [batch * len(turn.seconds) / sum(turn.seconds) for turn in turns]
    steps = [second for turn in turns for second in turn.seconds]
    peaks = [turn.peak_bytes for turn in turns if turn.peak_bytes is not None]
    peak = max(peaks) / MIB if peaks else None
    return Speed(batch * len(steps) / sum(steps), min(rates), max(rates), peak)


def ratio_of(turns: list[Turn], twins: list[Turn]) -> Ratio:
    """How many times as fast as its twin: mean step times of each round, one by the other."""
    ratios = [
        statistics.mean(twin.seconds) / statistics.mean(turn.seconds)
        for turn, twin in zip(turns, twins, strict=True)
    ]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def unless_out_of_memory(attempt: Callable[[], Result]) -> Result | None:
    """The result of `attempt`, or None, with the memory given back, if there was not enough."""
    try:
        return attempt()
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
    # Outside the handler: the traceback would keep the tensors of the step alive.
    free_memory()
    return None


def free_memory() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
