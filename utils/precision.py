"""In which number format a step computes: fp32, tf32, bf16 or fp16 with a gradient scaler."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError

_MODES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_mode(mode: str) -> None:
    """UserError for a name that no mode has."""
    if mode not in ("auto", *_MODES):
        raise UserError(f"training.precision={mode} is unknown; choose auto, {', '.join(_MODES)}")


class Precision:
    """Autocast and, for fp16, the gradient scaler (torch's: 2^16, halved on overflow).

    Parameters, gradients and optimiser state stay float32. `auto` is bf16 on CUDA (fp16 before
    Ampere, where bf16 is emulated) and fp32 elsewhere; fp32 means exact float32 products and
    convolutions, every other mode lets those that remain in float32 use TF32.
    """

    def __init__(self, mode: str = "auto", device: torch.device | str = "cpu") -> None:
        self.device_type = torch.device(device).type
        check_mode(mode)
        if mode == "auto":
            mode = auto_mode(self.device_type)
        self.mode, self.dtype = mode, _MODES[mode]
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=mode == "fp16")
        if self.device_type == "cuda":
            torch.set_float32_matmul_precision("highest" if mode == "fp32" else "high")
            # Of which cuDNN's convolutions, TF32 by torch's default, know nothing.
            torch.backends.cudnn.allow_tf32 = mode != "fp32"

    @property
    def scales(self) -> bool:
        """Whether gradients are scaled (fp16), so that overflows are to be expected."""
        return self.mode == "fp16"

    def notes(self) -> list[str]:
        """Warnings for the user before the training starts."""
        if (self.mode, self.device_type) != ("fp16", "cpu"):
            return []
        return [
            "training.precision=fp16 is for GPUs: products on a CPU may take a hundred times as "
            "long as with fp32"
        ]

    def autocast(self) -> AbstractContextManager[None]:
        """The context of a forward pass."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate `loss`, scaled if need be."""
        self.scaler.scale(loss).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the gradients true ones, to be clipped."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step the optimiser and let the scale grow."""
        self.scaler.step(optimizer)
        self.scaler.update()

    def skip(self) -> None:
        """Lower the scale instead of stepping."""
        # Explicit, since with sharded gradients not every rank saw the inf.
        if self.scales:
            self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state, empty without one."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the scaler's state back; a run that changed to or from fp16 starts its own."""
        if state and self.scales:
            self.scaler.load_state_dict(state)


def auto_mode(device_type: str) -> str:
    """What `auto` is on this machine's device of a type."""
    if device_type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision widened to float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@contextmanager
def float32_products_in(precision: str) -> Iterator[None]:
    """Float32 products in `highest`, `high` or `medium` (torch.set_float32_matmul_precision).

    In `highest` cuDNN's convolutions, which torch lets use TF32 by default, are exact too.
    """
    cudnn: Any = torch.backends.cudnn
    newer: tuple[Any, ...] = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    newer = (*newer, cudnn.conv, cudnn.rnn)
    formats = [backend.fp32_precision for backend in newer]
    before = _unless_mixed(torch.get_float32_matmul_precision)
    tf32_before = _unless_mixed(lambda: cudnn.allow_tf32)
    torch.set_float32_matmul_precision(precision)
    if precision == "highest":
        cudnn.allow_tf32 = False
    try:
        yield
    finally:
        if before is not None:
            torch.set_float32_matmul_precision(before)
        if tf32_before is not None:
            cudnn.allow_tf32 = tf32_before
        for backend, own in zip(newer, formats, strict=True):
            backend.fp32_precision = own


def _unless_mixed(setting: Callable[[], Any]) -> Any:
    """An older setting of float32's format; None where the newer ones alone were used."""
    try:
        return setting()
    except RuntimeError:
        return None
