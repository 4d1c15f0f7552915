"""Images per second and peak memory of nets that are measured in turn.

A turn is one untimed step and some timed steps of one net; in a round every net has one turn. Other
load on the machine affects all nets of a round alike, so ratios are taken per round.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.cost.graphs import Recording, is_out_of_memory, record
from evaluation.cost.peaks import synchronize
from evaluation.nets import num_classes_of
from evaluation.progress import say, track
from utils.errors import UserError
from utils.parallel import blocks_of
from utils.ranges import check_count

INFERENCE, TRAINING = "inference", "training step"
PASSES = (INFERENCE, TRAINING)
MIB = 2**20
Result = TypeVar("Result")


class Turn(NamedTuple):
    """Seconds of each timed step, and the peak memory in bytes if the device reports it."""

    seconds: list[float]
    peak_bytes: int | None


class Speed(NamedTuple):
    """One net's speed in one pass over all rounds."""

    images_per_second: float  # over the time of all timed steps, as published
    slowest_round: float  # images per second
    fastest_round: float
    peak_mib: float | None


class Ratio(NamedTuple):
    """A net's speed relative to its twin's: median, smallest and largest over the rounds."""

    median: float
    least: float
    greatest: float


class Contestant:
    """A net with a batch of random images and labels, ready to be timed on their device.

    Random labels and cross-entropy for a classifier, else the mean square of the pooled feature;
    AdamW; autocast in `dtype`, if one is given.

    compile: in place, as in training: each block by itself, so that equal blocks share their
        compiled code; a net without `blocks` as a whole.
    graphs: on a CUDA device, capture each pass in its first turn as a CUDA graph and replay it
        until `release`.
    """

    def __init__(
        self,
        net: nn.Module,
        images: Tensor,
        *,
        dtype: torch.dtype | None = None,
        compile: bool = False,
        graphs: bool = False,
    ) -> None:
        self.net, self.images, self.dtype, self.graphs = net, images, dtype, graphs
        for unit in (blocks_of(net) or [net]) if compile else ():
            unit.compile()
        classes = num_classes_of(net)
        labels = torch.randint(max(classes, 1), (len(images),), device=images.device)
        self.labels = labels if classes else None
        self.recordings: dict[str, Recording] = {}
        self._recorded_bytes: dict[str, int] = {}

    def turn(self, kind: str, steps: int) -> Turn:
        """Run one untimed step and `steps` timed ones, each until the device has finished."""
        device = self.images.device
        if self.graphs:
            replay = self._recording(kind).graph.replay
            return Turn(_time(replay, 1 + steps, device)[1:], self._recorded_bytes[kind])
        on_cuda = device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
            others = torch.cuda.memory_allocated(device) - self._own_bytes()
        step, optimizer = self._ready(kind)
        try:
            seconds = _time(step, 1 + steps, device)
        finally:
            if optimizer:
                optimizer.zero_grad(set_to_none=True)
        peak = torch.cuda.max_memory_allocated(device) - others if on_cuda else None
        return Turn(seconds[1:], peak)

    def release(self) -> None:
        """Free the captured passes and the memory reserved for them."""
        if self.recordings:
            self.recordings.clear()
            free_memory()

    def _recording(self, kind: str) -> Recording:
        if kind not in self.recordings:
            step, optimizer = self._ready(kind)
            try:
                made = record(step, self.images.device)
            finally:
                if optimizer:
                    optimizer.zero_grad(set_to_none=True)
            # The optimiser's state, made before the capture, also counts in a turn without graphs.
            state = sum(map(_bytes_of, _state_of(optimizer)))
            self._recorded_bytes[kind] = self._own_bytes() + state + made.grown_bytes
            self.recordings[kind] = made
        return self.recordings[kind]

    def _ready(self, kind: str) -> tuple[Callable[[], Tensor], torch.optim.Optimizer | None]:
        """Set the net's mode for a pass; returns a function that runs a step, and its optimiser."""
        self.net.train(kind == TRAINING)
        if kind == INFERENCE:
            return self._infer, None
        trained = [p for p in self.net.parameters() if p.requires_grad]
        # Fused, as in training (`utils.optimizers`).
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True, capturable=self.graphs)
        return partial(self._train, optimizer), optimizer

    def _infer(self) -> Tensor:
        with torch.no_grad(), self.autocast():
            output: Tensor = self.net(self.images)
        return output

    def _train(self, optimizer: torch.optim.Optimizer) -> Tensor:
        with self.autocast():
            loss = self.loss(self.net(self.images))
        loss.backward()
        optimizer.step()
        # Also in a capture: each replay allocates gradients anew, in the graph's own memory.
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def loss(self, output: Tensor) -> Tensor:
        """The loss of a batch's output [B classes] or [B D]."""
        if self.labels is None:
            return output.float().square().mean()
        return F.cross_entropy(output.float(), self.labels)

    def autocast(self) -> torch.autocast:
        """The autocast context of a forward pass."""
        return torch.autocast(
            self.images.device.type,
            dtype=self.dtype,
            enabled=self.dtype is not None,
            cache_enabled=not self.graphs,  # the capture would lack casts cached before it
        )

    def _own_bytes(self) -> int:
        return sum(map(_bytes_of, [*self.net.parameters(), *self.net.buffers(), self.images]))


def measure_in_turn(
    contestants: Mapping[str, Contestant],
    kind: str,
    *,
    steps: int,
    rounds: int,
    warmup: int,
) -> tuple[dict[str, list[Turn]], list[str]]:
    """Turns of every net, one per round, and the names of nets that ran out of memory.

    Each net gets `steps` timed steps in all, divided over `rounds`, after a turn of `warmup` steps
    that do not count. Captured passes are released at the end. UserError, with the net's name, for
    a net that cannot be captured.
    """
    racing = dict(contestants)
    turns: dict[str, list[Turn]] = {name: [] for name in contestants}
    lost: list[str] = []
    batch = len(next(iter(contestants.values())).images)
    shares = [steps // rounds + (index < steps % rounds) for index in range(rounds)]
    plan = [*([(0, warmup)] if warmup else []), *enumerate(shares, start=1)]
    label = f"{kind}s" if kind == TRAINING else kind
    schedule = [(name, index, share) for index, share in plan for name in contestants]
    try:
        for name, index, share in track(
            schedule,
            total=sum(1 + share for _, _, share in schedule) * batch,
            label=f"{label}, images",
            size=lambda entry: (1 + entry[2]) * batch,
        ):
            if name not in racing:
                continue
            turn = unless_out_of_memory(partial(_turn_of, name, racing[name], kind, share))
            if turn is None:
                del racing[name]
                lost.append(name)
                less = "--batch-size N takes less"
                say(f"{name}: out of memory in {kind} at batch {batch}; {less}")
            elif index:
                turns[name].append(turn)
    finally:
        for contestant in contestants.values():
            contestant.release()
    return {name: turns[name] for name in racing}, lost


def speed_of(turns: list[Turn], batch: int) -> Speed:
    """Images per second and peak memory over the turns of one net.

    OutOfRange if there is no turn, or one without a timed step.
    """
    check_count("steps", min((len(turn.seconds) for turn in turns), default=0), 1)
    rates = [batch * len(turn.seconds) / sum(turn.seconds) for turn in turns]
    steps = [second for turn in turns for second in turn.seconds]
    peaks = [turn.peak_bytes for turn in turns if turn.peak_bytes is not None]
    peak = max(peaks) / MIB if peaks else None
    return Speed(batch * len(steps) / sum(steps), min(rates), max(rates), peak)


def ratio_of(turns: list[Turn], twins: list[Turn]) -> Ratio:
    """Speed relative to the twin: the ratio of mean step times in each round."""
    ratios = [
        statistics.mean(twin.seconds) / statistics.mean(turn.seconds)
        for turn, twin in zip(turns, twins, strict=True)
    ]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def _turn_of(name: str, contestant: Contestant, kind: str, steps: int) -> Turn:
    try:
        return contestant.turn(kind, steps)
    except UserError as error:
        raise UserError(f"{name}: {kind} {error}") from None


def _time(step: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Seconds of each step, until the device has finished it."""
    seconds = []
    for _ in range(count):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def _state_of(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    states = optimizer.state.values() if optimizer else ()
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def unless_out_of_memory(attempt: Callable[[], Result]) -> Result | None:
    """The result of `attempt`; None, with its memory freed, if it ran out of memory."""
    try:
        return attempt()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler: the traceback would keep the tensors of the step alive.
    free_memory()
    return None


def free_memory() -> None:
    """Free memory that is no longer in use, also in torch's CUDA cache."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
