"""Skip steps that are not finite, end a run with too many of them, and warn of collapse."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from utils import distributed, parallel
from utils.checkpoints.checkpoint import Checkpoints
from utils.errors import UserError
from utils.precision import Precision
from utils.probing import undisturbed
from utils.signals import StopSignal

# Below this effective rank, or relative standard deviation, features have collapsed.
MIN_RANK, MIN_STD = 1.5, 1e-3


class Health:
    """Guards the state against NaN and inf, and watches the features.

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
        self.alarm = ""  # one line if the last `examine` found collapsed features
        self._overflows = False  # whether it found features not finite, of finite images
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
        if self._overflows:
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

    def examine(self, net: nn.Module, batch: Any) -> dict[str, float]:
        """Effective rank and standard deviation of the net's features on the batch's images.

        At most 128 images per rank; empty for a net that is no Backbone, whatever its `features`
        are, and for one image or two, which span a line whatever the net. Every rank must call
        this.
        """
        images = _images(batch)
        if images is None or not callable(getattr(net, "features", None)):
            return {}
        with undisturbed(net):
            found = net.features(images[:128])
        last = found[-1] if isinstance(found, list | tuple) and found else None
        features = getattr(last, "cls", None)
        if not isinstance(features, Tensor):  # as of torchvision's VGG, or of a net of the user's
            return {}
        features = distributed.all_gather_variable(parallel.whole(features).float()).cpu()
        self._overflows = not features.isfinite().all()
        if self._overflows:  # on every rank, as all have gathered the same
            shown = (~images.isfinite().all()).float()
            self._overflows = not distributed.all_reduce_max(shown)
            what = "features" if self._overflows else "images"
            self.alarm = f"ALARM: the {what} are not finite"
            return {}
        if len(features) <= 2:
            self.alarm = ""
            return {}
        std = relative_std(features)
        rank = effective_rank(features)
        self.alarm = ""
        if not (rank >= MIN_RANK and std >= MIN_STD):
            self.alarm = (
                f"ALARM: the features have collapsed (effective rank {rank:.2f}, relative "
                f"standard deviation {std:.1e}): all images look alike to the network"
            )
        return {
            "feature_rank": rank,
            "feature_std": features.std(0).mean().item(),
            "feature_relative_std": std,
        }


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the centred features' [B D] singular values, normalised to sum 1.

    From 1 to min(B - 1, D). Roy and Vetterli 2007; 0 for constant features.
    """
    centred = (features - features.mean(0)).double()
    values = torch.linalg.svdvals(centred)
    shares = values / values.sum().clamp(min=1e-300)
    return torch.special.entr(shares).sum().exp().item() if values.sum() > 0 else 0.0


def relative_std(features: Tensor) -> float:
    """Root mean square distance of features [B D] from their mean, over that from 0: 0 to 1."""
    features = features.double()
    spread = (features - features.mean(0)).square().sum(1).mean()
    return (spread / features.square().sum(1).mean().clamp(min=1e-300)).sqrt().item()


def broken_weights(recipe: nn.Module, step: int) -> str:
    """A line about weights (those of an EMA included) that are not finite; "" if all are.

    Every rank must call this and gets the same answer.
    """
    weights = [parallel.local(weight.detach()) for weight in recipe.parameters()]
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


def _images(batch: Any) -> Tensor | None:
    # The largest images of the batch, whatever the recipe calls them: float tensors [B C H W],
    # maybe in lists.
    found: list[Tensor] = []

    def visit(value: Any) -> None:
        if isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point():
            found.append(value)
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    visit(batch)
    return max(found, key=lambda images: images.shape[-1] * images.shape[-2]) if found else None
