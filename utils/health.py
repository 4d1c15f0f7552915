"""Skip steps that are not finite, and end a run with too many of them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from utils import distributed, layout
from utils.checkpoints.checkpoint import Checkpoints
from utils.collapse import FeatureWatch
from utils.errors import UserError
from utils.precision import Precision
from utils.signals import StopSignal


class Health:
    """Guards the state against NaN and inf.

    A step whose losses or gradient norms are not finite is skipped: parameters, optimiser state and
    buffers (such as running centres, which the forward pass has moved) stay as before it.
    `nan_patience` such steps in a row end the run. An fp16 overflow of gradients alone is skipped
    but not counted, as the scaler is still lowering its scale. A step may be finite and still break
    the weights, which only the next steps show; so the state from before them is looked at before
    `give_up` saves it, as `broken_weights` looks at every state before a save of the loop.
    """

    def __init__(self, *, nan_patience: int = 2) -> None:
        self.nan_patience = nan_patience
        self.bad_steps: list[tuple[int, dict[str, float]]] = []
        self.skipped = 0
        self.features = FeatureWatch()
        self._recipe: nn.Module | None = None
        self._tables: list[dict[str, Tensor | None]] = []
        self._copies: dict[tuple[int, str], Tensor] = {}

    @torch.no_grad()
    def remember(self, recipe: nn.Module) -> None:
        """Copy the buffers, which the forward pass may change."""
        if self._recipe is not recipe:  # walking its modules costs more than copying does
            self._recipe, self._tables = recipe, [part._buffers for part in recipe.modules()]
        self._copies = {place: buffer.clone() for place, buffer in self._buffers().items()}

    @torch.no_grad()
    def undo(self) -> None:
        """Put the buffers back."""
        for place, buffer in self._buffers().items():
            if place in self._copies:
                buffer.copy_(self._copies[place])

    def _buffers(self) -> dict[tuple[int, str], Tensor]:
        # Read anew each time: a module may have put another tensor in the place of a buffer.
        return {
            (number, name): buffer
            for number, table in enumerate(self._tables)
            for name, buffer in table.items()
            if buffer is not None
        }

    def agree(
        self,
        step: int,
        losses: Mapping[str, Tensor],
        norms: Mapping[str, Tensor],
        stop: StopSignal,
        precision: Precision,
    ) -> tuple[bool, bool]:
        """Whether `step` (from 0) is finite on every rank, and whether any rank got a stop signal.

        The only place where a step waits for the device: one stacked tensor, one reduction, one
        read. Every rank must call this.
        """
        loss_bad = ~torch.stack([value.float() for value in losses.values()]).isfinite().all()
        norm_bad = (
            ~torch.stack([v.float() for v in norms.values()]).isfinite().all()
            if norms
            else loss_bad
        )
        asked = torch.tensor(stop.received is not None).to(loss_bad.device, non_blocking=True)
        flags = torch.stack([loss_bad, norm_bad, asked]).float()
        bad_loss, bad_norm, stopping = (
            bool(flag) for flag in distributed.all_reduce_max(flags).tolist()
        )
        if not (bad_loss or bad_norm):
            self.bad_steps = []
            return True, stopping
        self.skipped += 1
        if bad_loss or not precision.scales:
            norms = {f"grad_norm/{name}": norm for name, norm in norms.items()}
            self.bad_steps.append((step + 1, {k: float(v) for k, v in {**losses, **norms}.items()}))
        return False, stopping

    @property
    def hopeless(self) -> bool:
        """Whether `nan_patience` steps in a row were not finite."""
        return len(self.bad_steps) >= self.nan_patience

    @property
    def sound_step(self) -> int:
        """The number of steps finished before the current row of bad ones."""
        return self.bad_steps[0][0] - 1

    def _fault(self, recipe: nn.Module) -> str:
        """What is wrong with the state from before the bad steps; "" if it may be kept.

        Weights must be finite, and so must their features (weights may be finite but huge). Every
        rank must call this and gets the same answer.
        """
        if fault := broken_weights(recipe, self.sound_step):
            return fault
        if self.features.overflow:
            which = f"the weights of step {self.sound_step}"
            return f"{which} give features that are not finite, so they make no checkpoint"
        return ""

    def give_up(
        self, recipe: nn.Module, checkpoints: Checkpoints, save: Callable[[int], object]
    ) -> UserError:
        """Save the state from before the bad steps if it is sound; returns the error to raise.

        The error names that checkpoint, or an earlier one if the state is not sound. Every rank
        must call this.
        """
        steps = ", ".join(str(step) for step, _ in self.bad_steps)
        losses = ", ".join(f"{k}={v:.4g}" for k, v in self.bad_steps[-1][1].items())
        fault = self._fault(recipe)
        if not fault:
            save(self.sound_step)
        fate = checkpoints.wait() or (
            f"the state from before them is in {checkpoints.path(self.sound_step)}"
        )
        if fault:
            fate = what_remains(fault, recipe, checkpoints)
        return UserError(f"not finite at step {steps} ({losses}): stopped; {fate}")


def broken_weights(recipe: nn.Module, step: int) -> str:
    """A line about weights (those of an EMA included) that are not finite; "" if all are.

    Every rank must call this and gets the same answer.
    """
    weights = [layout.local(weight.detach()) for weight in recipe.parameters()]
    broken = ~torch.stack([weight.isfinite().all() for weight in weights]).all()
    if bool(distributed.all_reduce_max(broken.float())):
        return f"the weights of step {step} are not finite, so they make no checkpoint"
    return ""


def what_remains(fault: str, recipe: nn.Module, checkpoints: Checkpoints) -> str:
    """`fault` with the checkpoint to go on from, as one line.

    Every rank must call this.
    """
    checkpoints.wait()
    step, _ = checkpoints.soundest([name for name, _ in recipe.named_parameters()])
    if step is None:
        return f"{fault}; there is no sound one"
    return f"{fault}; the last sound one is {checkpoints.path(step)}"
