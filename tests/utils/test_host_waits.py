"""No part of a training step waits for the device: a step runs where there is nothing to read.

Tensors on the `meta` device have shapes and no values, so that whatever would fetch a value to the
host (`item`, `tolist`, `bool`, `nonzero`, a boolean index) fails there. The loop itself waits once,
in `utils.health.Health.agree`. Numbers of the host may not be copied there either
(`torch.tensor(..., device=)`, `new_tensor`), which waits as well. tests/gpu/test_host_waits.py asks
CUDA the same.
"""

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.step_cases import CASES, make_case, take_steps


@pytest.fixture(autouse=True)
def autocast_on_meta(monkeypatch):
    """Autocast does not know `meta`; it computes nothing there."""
    autocast = torch.autocast
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda device_type, **options: autocast(
            "cpu" if device_type == "meta" else device_type, **options
        ),
    )


class NoCopies(TorchFunctionMode):
    """Refuses to make tensors of the device from numbers of the host."""

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and made.is_meta:
            raise RuntimeError(f"{function.__name__} copies from the host, and waits for it")
        return made


@pytest.mark.parametrize("name", CASES)
def test_a_step_reads_nothing(name):
    recipe, optimizer, batch = make_case(name, "meta")
    take_steps(recipe, optimizer, batch, 1)  # the optimiser makes its state
    with NoCopies():
        take_steps(recipe, optimizer, batch, 1)


def test_a_step_that_reads_is_found():
    recipe, optimizer, batch = make_case("deit plain", "meta")
    recipe.after_step = lambda step: bool(recipe.model.head.bias.isfinite().all())
    with pytest.raises(RuntimeError, match="meta"):
        take_steps(recipe, optimizer, batch, 1)
    recipe.after_step = lambda step: recipe.model.head.bias.new_tensor(step)
    with pytest.raises(RuntimeError, match="new_tensor copies"), NoCopies():
        take_steps(recipe, optimizer, batch, 1)
